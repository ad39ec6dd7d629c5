"""Which parts of a model are stored in 8 bits, as users say it."""

from collections.abc import Mapping

# Kinds: 8-bit floats (e4m3, arXiv 2209.05433) or integers. Weights have a scale for each output channel; what they are
# multiplied with is rounded to the same kind in each product, with a scale for each token.
KINDS = ("fp8", "int8")
# Parts: the products in the layers of an expert, or of the ViT. What is in none stays as it is: embeddings, norms, the
# head, the connector, and the VAE.
PARTS = ("und", "gen", "vit")
BY_DEFAULT = ("und", "gen")  # where one kind is named for all

Quantization = str | Mapping[str, str]


def kinds_of_parts(quantization: Quantization | None) -> dict[str, str]:
    """The kind of each part that is quantised. Raises ValueError."""
    if quantization is None:
        return {}
    found = dict.fromkeys(BY_DEFAULT, quantization) if isinstance(quantization, str) else quantization
    if not isinstance(found, Mapping) or not all(part in PARTS and kind in KINDS for part, kind in found.items()):
        raise ValueError(
            f"quantization={quantization!r:.200}; allowed: {' or '.join(map(repr, KINDS))}, or an object from "
            f"{', '.join(map(repr, PARTS))} to these"
        )
    return dict(found)
