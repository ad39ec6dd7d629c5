"""Reading and writing safetensors files with torch, one tensor after another, so that they are never all in memory twice
(https://github.com/huggingface/safetensors)."""

import json
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import BundleError
from bagel_opt.files.weights import Location, locate_weights

ALIGNED = 64  # bytes; the first tensor's place, so that a mapped file can be read as it lies

# What is to be written: (name, shape, dtype), in order.
Layout = list[tuple[str, tuple[int, ...], torch.dtype]]


class Reader:
    """Reads tensors from files, each mapped by itself: pages that were read count as this process's memory only as long as
    their tensor is there, and safetensors' own reader maps a whole file so that it may be written to, which Linux refuses
    for a file larger than the machine's memory. Raises `error` where a file is no whole one, or holds numbers that are none."""

    def __init__(self, error: type[ValueError]):
        self.error = error
        self.places: dict[Path, dict[str, Location]] = {}

    def read(self, path: Path, name: str) -> Tensor:
        """The tensor of that name in that file. What is written to it does not reach the file."""
        if path not in self.places:
            self.places[path] = locate_weights(path, self.error)
        at = self.places[path][name]
        dtype = getattr(torch, at.dtype.name)
        if not at.length:  # which cannot be mapped
            return torch.empty(at.shape, dtype=dtype)
        found = torch.from_numpy(np.memmap(path, np.uint8, "c", at.offset, (at.length,))).view(dtype).view(at.shape)
        if not _is_finite(found):
            raise self.error(
                f"{path}: {name:.200} holds NaN or infinities, with which no answer is right; take another file"
            )
        return found


def _is_finite(tensor: Tensor) -> bool:
    """A sum that is finite has nothing else in it, and takes as long as a copy; a look at each number takes ten times that."""
    if tensor.dtype == torch.float8_e4m3fn:
        return bool(((tensor.view(torch.uint8) & 127) != 127).all())
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a bundle's file, each in memory of its own: products on the CPU take 9% longer with a mapped file's.
    Raises BundleError."""
    reader = Reader(BundleError)
    return {name: reader.read(path, name).to(device, copy=True) for name in locate_weights(path)}


def write_weights(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors (name, Tensor), which come in the order of `layout`, each in the dtype that it is to have there: the
    library's own writer wants all of them at once."""
    header, end = {}, 0
    for name, shape, dtype in layout:
        start, end = end, end + prod(shape) * dtype.itemsize
        kind = DTYPES[str(dtype).removeprefix("torch.")].safetensors
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (wanted, shape, dtype), (name, tensor) in zip(layout, tensors, strict=True):
            if (wanted, shape) != (name, tuple(tensor.shape)):
                raise ValueError(f"{name} {list(tensor.shape)} came where {wanted} {list(shape)} is to be written")
            file.write(_bytes(tensor.to(dtype)))


def write_parameters(path: Path, model: nn.Module) -> None:
    """A model's parameters, under their names in it, each in its own dtype."""
    weights = dict(model.named_parameters())
    write_weights(path, [(name, tuple(p.shape), p.dtype) for name, p in weights.items()], weights.items())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
