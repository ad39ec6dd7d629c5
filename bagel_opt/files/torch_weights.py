"""Reading and writing safetensors files with torch, one tensor after another, so that they are never all in memory twice
(https://github.com/huggingface/safetensors)."""

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import BundleError, reason
from bagel_opt.files.weights import locate_weights

READ_AT_ONCE = 32 * 2**20  # bytes mapped before the file is closed, so that read pages leave memory
ALIGNED = 64  # bytes; the first tensor's place, so that a mapped file can be read as it lies

# What is to be written: (name, shape, dtype), in order.
Layout = list[tuple[str, tuple[int, ...], torch.dtype]]


@contextlib.contextmanager
def opened(path: Path, error: type[ValueError]) -> Iterator:
    """Raises `error` where the file is no whole one, which locate_weights should have found."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as bad:
        raise error(f"{path} is no complete safetensors file ({reason(bad)}); copy or download it again") from None


class Reader:
    """Reads tensors from memory-mapped files, mapping each file anew after some bytes: pages that were read would
    otherwise count as this process's memory until the file is closed. Raises `error`."""

    def __init__(self, error: type[ValueError]):
        self.error = error
        self.file, self.path = None, None
        self.stack = contextlib.ExitStack()
        self.bytes = 0

    def read(self, path: Path, name: str) -> Tensor:
        """The tensor of that name in that file."""
        if path != self.path or self.bytes > READ_AT_ONCE:
            self.close()
            self.file, self.path = self.stack.enter_context(opened(path, self.error)), path
        tensor = self.file.get_tensor(name)
        self.bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        self.stack.close()
        self.path, self.bytes = None, 0


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a bundle's file, each in memory of its own: products on the CPU take 9% longer with a mapped file's.
    Raises BundleError."""
    with contextlib.closing(Reader(BundleError)) as reader:
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
