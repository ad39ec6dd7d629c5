"""Writing weights.safetensors one tensor after another, so that they are never all in memory."""

import json
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNED = 64  # bytes; the first tensor's place, so that a mapped file can be read as it lies


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[tuple]) -> None:
    """Writes tensors (name, Tensor), which come in the order of `shapes`, as a safetensors file
    (https://github.com/huggingface/safetensors): the library's own writer wants all of them at once."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (wanted, shape), (name, tensor) in zip(shapes.items(), tensors, strict=True):
            if (wanted, shape) != (name, tuple(tensor.shape)):
                raise ValueError(f"{name} {list(tensor.shape)} came where {wanted} {list(shape)} is to be written")
            file.write(_bytes(tensor.to(dtype)))


def write_parameters(path: Path, model: nn.Module) -> None:
    """A model's parameters, under their names in it."""
    weights = dict(model.named_parameters())
    dtype = next(iter(weights.values())).dtype
    write_weights(path, {name: tuple(p.shape) for name, p in weights.items()}, dtype, weights.items())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
