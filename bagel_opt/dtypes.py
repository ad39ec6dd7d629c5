"""The numbers that tensors are made of: one table for checkpoints, bundles, and every runtime."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """name: as torch and NumPy have it (NumPy knows bfloat16 once ml_dtypes is imported); bytes: of one number;
    safetensors: its name in a file's header; onnx: its number in TensorProto.DataType."""

    name: str
    bytes: int
    safetensors: str
    onnx: int


DTYPES = {
    d.name: d
    for d in (
        DType("float64", 8, "F64", 11),
        DType("float32", 4, "F32", 1),
        DType("float16", 2, "F16", 10),
        DType("bfloat16", 2, "BF16", 16),
        DType("int64", 8, "I64", 7),
        DType("int32", 4, "I32", 6),
        DType("int8", 1, "I8", 3),
        DType("uint8", 1, "U8", 2),
        DType("float8_e4m3fn", 1, "F8_E4M3", 17),
    )
}
BY_SAFETENSORS = {d.safetensors: d for d in DTYPES.values()}
BY_ONNX = {d.onnx: d for d in DTYPES.values()}
COMPUTE = ("float32", "bfloat16", "float16")  # in which a model may compute
STORED = ("float64", *COMPUTE, "float8_e4m3fn")  # in which a checkpoint's weights may lie
