"""A safetensors file without torch: where each tensor lies, and its bytes as they lie (https://github.com/huggingface/safetensors)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bagel_opt.dtypes import BY_SAFETENSORS, DType
from bagel_opt.errors import BundleError
from bagel_opt.json_files import parse_json

MAPPED_AT_ONCE = 256 * 2**20  # bytes
LONGEST_HEADER = 100_000_000  # bytes, as in the library
MOST_DIMENSIONS, LARGEST = 8, 2**62  # of a tensor; of a number


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes are in a file."""

    offset: int
    length: int
    dtype: DType
    shape: tuple[int, ...]


def locate_weights(path: Path, error: type[ValueError] = BundleError) -> dict[str, Location]:
    """The places of all tensors. Raises what `read_header` raises."""
    return read_header(path, error)[0]


def read_header(path: Path, error: type[ValueError] = BundleError) -> tuple[dict[str, Location], dict[str, str]]:
    """The places of all tensors and the notes (`__metadata__`), from the file's header. Raises `error` where that is no
    header, or not that of this file: tensors lie one after the other, from its end to the file's."""

    def check(right: bool, what: str) -> None:
        if not right:
            raise error(f"{path} is no complete safetensors file ({what}); copy or download it again")

    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        begin = 8 + int.from_bytes(file.read(8), "little")
        check(8 < begin <= min(total, LONGEST_HEADER), f"of {total} bytes, its header has {begin - 8}")
        header = parse_json(file.read(begin - 8), f"the header of {path}", error)
    check(isinstance(header, dict), "the header is no JSON object")
    notes = header.pop("__metadata__", {})
    check(isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values()), "__metadata__ is no texts")
    found = {}
    for name, entry in header.items():
        check(_is_entry(entry), f"tensor {name:.200} has something else than a dtype, a shape and data_offsets")
        (start, end), shape, kind = entry["data_offsets"], entry["shape"], entry["dtype"]
        check(kind in BY_SAFETENSORS, f"tensor {name:.200} is {kind:.60}, which is not known here")
        dtype = BY_SAFETENSORS[kind]
        size = prod(shape) * dtype.bytes
        check(end - start == size, f"tensor {name:.200} is {dtype.name} {shape} in {end - start} bytes")
        found[name] = Location(begin + start, size, dtype, tuple(shape))
    at = begin
    for name, place in sorted(found.items(), key=lambda item: (item[1].offset, item[1].length)):
        check(place.offset == at, f"tensor {name:.200} does not begin where the one before it ends")
        at += place.length
    check(at == total, f"its tensors end at {at} of {total} bytes")
    return found, notes


def _is_entry(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [start, end], **more}:
            numbers = all(type(number) is int and 0 <= number <= LARGEST for number in (*shape, start, end))
            return numbers and not more and len(shape) <= MOST_DIMENSIONS
    return False


def mapped_weights(path: Path) -> Iterator[tuple[str, DType, np.ndarray]]:
    """Each tensor as an array that is mapped from the file; a dtype of which NumPy does not know needs ml_dtypes. The file
    is mapped anew after some bytes: pages that were read would otherwise count as this process's memory until the end."""
    mapped, begin = None, 0
    for name, at in locate_weights(path).items():
        if mapped is None or at.offset + at.length - begin > MAPPED_AT_ONCE:
            mapped, begin = np.memmap(path, np.uint8, "r"), at.offset
        yield name, at.dtype, mapped[at.offset : at.offset + at.length].view(at.dtype.name).reshape(at.shape)
