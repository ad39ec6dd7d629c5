"""A safetensors file without torch: where each tensor lies, and its bytes as they lie (https://github.com/huggingface/safetensors)."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagel_opt.dtypes import BY_SAFETENSORS, DType

MAPPED_AT_ONCE = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes are in a file."""

    offset: int
    length: int
    dtype: DType
    shape: tuple[int, ...]


def locate_weights(path: Path) -> dict[str, Location]:
    """The places of all tensors, from the file's header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Location(8 + length + start, end - start, BY_SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
    return found


def mapped_weights(path: Path) -> Iterator[tuple[str, DType, np.ndarray]]:
    """Each tensor as an array that is mapped from the file; a dtype of which NumPy does not know needs ml_dtypes. The file
    is mapped anew after some bytes: pages that were read would otherwise count as this process's memory until the end."""
    mapped, begin = None, 0
    for name, at in locate_weights(path).items():
        if mapped is None or at.offset + at.length - begin > MAPPED_AT_ONCE:
            mapped, begin = np.memmap(path, np.uint8, "r"), at.offset
        yield name, at.dtype, mapped[at.offset : at.offset + at.length].view(at.dtype.name).reshape(at.shape)
