"""Which parts of a model are stored in 8 or 4 bits, as users say it."""

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """How a weight [N, C] is stored. codes, scale: the dtypes. group: channels that share a scale, 0 for all of a row."""

    codes: str
    scale: str
    group: int = 0

    def shapes(self, weight: Shape) -> tuple[Shape, Shape]:
        """Those of the codes and of the scale. A group that C does not fill is stored as a whole one."""
        rows, channels = weight
        if not self.group:
            return (rows, channels), (rows,)
        groups = -(-channels // self.group)
        return (rows, groups * self.group // 2), (rows, groups)


# fp8, int8: 8-bit floats (e4m3, arXiv 2209.05433) or integers, with a scale for each output channel; what they are
# multiplied with is rounded to the same kind in each product, with a scale for each token. int4: integers, with a scale for
# each group of input channels; weights alone.
KINDS = {
    "fp8": Kind("float8_e4m3fn", "float32"),
    "int8": Kind("int8", "float32"),
    "int4": Kind("uint8", "bfloat16", group=32),
}
BLOCK = 128  # channels that share a scale in "int8" in ONNX for CUDA, whose nodes want them in blocks: it is repeated
# Parts: the products in the layers of an expert, or of the ViT; the head, which makes the logits of a token; the table of the
# tokens' embeddings, of which rows are read. What is in none stays as it is: norms, the connector, and the VAE.
PARTS = ("und", "gen", "vit", "head", "embeddings")
BY_DEFAULT = ("und", "gen")  # where one kind is named for all

NEEDS = {"fp8": (8, 9), "int8": (8, 0), "int4": (8, 0)}  # compute capability, of a GPU
IN_ONNX = {"int8", "int4"}  # kinds for which ONNX Runtime has products, see `fits_onnx`
FOR_ONNX = "'int8' and 'int4', on the CPU in float32 and for CUDA in float16 and bfloat16"

Quantization = str | Mapping[str, str]


def kinds_of_parts(quantization: Quantization | None) -> dict[str, str]:
    """The kind of each part that is quantised. Raises ValueError."""
    if quantization is None:
        return {}
    found = dict.fromkeys(BY_DEFAULT, quantization) if isinstance(quantization, str) else quantization
    if not isinstance(found, Mapping) or not all(
        part in PARTS and isinstance(kind, str) and kind in KINDS for part, kind in found.items()
    ):
        raise ValueError(
            f"quantization={quantization!r:.200}; allowed: {' or '.join(map(repr, KINDS))}, or an object from "
            f"{', '.join(map(repr, PARTS))} to these"
        )
    return dict(found)


def kinds_of_products(kinds: Mapping[str, str]) -> set[str]:
    """Those of the parts that are multiplied with, which all are but a table."""
    return {kind for part, kind in kinds.items() if part != "embeddings"}


def fits_onnx(kinds: Mapping[str, str], device: str, dtype: str) -> bool:
    """Whether an ONNX bundle can have parts in these kinds."""
    fitting = dtype == "float32" if device == "cpu" else dtype in ("float16", "bfloat16")
    return not kinds or (fitting and IN_ONNX.issuperset(kinds.values()))
