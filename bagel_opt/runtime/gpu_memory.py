"""A GPU's memory for a process without torch: tensors in it, and what is copied to them and from them.

By NVIDIA's cuda-bindings. Every function returns when its work is done, since ONNX Runtime has streams of its own.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes  # noqa: F401  by which NumPy knows bfloat16
import numpy as np

from bagel_opt.dtypes import DTYPES


@dataclass(frozen=True)
class DeviceTensor:
    """A dense tensor on the GPU, or some rows of one. owner: what keeps its memory alive."""

    pointer: int
    shape: tuple[int, ...]
    kind: str  # of dtypes.DTYPES
    owner: Any

    def __getitem__(self, rows: int | slice) -> "DeviceTensor":
        """tensor[row] or tensor[first:last], of which nothing is copied."""
        row = self.nbytes // self.shape[0]
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.shape[0])
            return DeviceTensor(self.pointer + first * row, (last - first, *self.shape[1:]), self.kind, self.owner)
        return DeviceTensor(self.pointer + rows * row, self.shape[1:], self.kind, self.owner)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.kind].bytes


class Allocation:
    """Bytes on the GPU, which are free again when nothing refers to them."""

    def __init__(self, memory: "GpuMemory", count: int):
        self.memory, self.count = memory, count
        self.pointer = memory.allocate(count)

    def __del__(self):
        if hasattr(self, "pointer"):
            self.memory.free(self.pointer)


class GpuMemory:
    """Raises ValueError where there is no such GPU, MemoryError where its memory is full, RuntimeError otherwise."""

    name = "cuda"  # as ONNX Runtime calls it

    def __init__(self, device: int = 0):
        from cuda.bindings import runtime

        self.cuda, self.device = runtime, device
        status, count = runtime.cudaGetDeviceCount()
        if int(status) or device >= count:
            found = self._reason(status) if int(status) else f"{count} of them"
            raise ValueError(f"there is no cuda:{device}: CUDA finds no such GPU here ({found})")
        self._check(runtime.cudaSetDevice(device), "choosing the GPU")

    def empty(self, shape: tuple[int, ...], kind: str) -> DeviceTensor:
        owner = Allocation(self, max(1, prod(shape) * DTYPES[kind].bytes))
        return DeviceTensor(owner.pointer, tuple(shape), kind, owner)

    def zeros(self, shape: tuple[int, ...], kind: str) -> DeviceTensor:
        tensor = self.empty(shape, kind)
        self.clear(tensor)
        return tensor

    def from_numpy(self, array: np.ndarray, kind: str) -> DeviceTensor:
        tensor = self.empty(array.shape, kind)
        self.upload(array, tensor)
        return tensor

    def upload(self, array: np.ndarray, to: DeviceTensor) -> None:
        """Copies an array of any type into the start of a tensor."""
        array = np.ascontiguousarray(array, to.kind)
        if array.nbytes > to.nbytes:
            raise ValueError(f"{array.nbytes} bytes do not fit into {to.nbytes}")
        self.copy(to.pointer, array.ctypes.data, array.nbytes)

    def numpy(self, tensor: DeviceTensor) -> np.ndarray:
        """On the host; 16-bit floats as float32."""
        array = np.empty(tensor.shape, tensor.kind)
        self.copy(array.ctypes.data, tensor.pointer, array.nbytes)
        return array.astype(np.float32) if array.dtype.itemsize == 2 else array

    # ---- what the device does, by address

    def allocate(self, count: int) -> int:
        status, pointer = self.cuda.cudaMalloc(count)
        if status == self.cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise MemoryError(f"the GPU has no {count / 1e9:.2f} GB left; use a smaller profile")
        self._check((status,), "allocating memory")
        return pointer

    def free(self, pointer: int) -> None:
        self.cuda.cudaFree(pointer)

    def copy(self, to: int, source: int, count: int) -> None:
        """Between host and device, or within either."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDefault
        self._check(self.cuda.cudaMemcpy(to, source, count, kind), "copying")
        self._finish()

    def clear(self, tensor: DeviceTensor) -> None:
        self._check(self.cuda.cudaMemset(tensor.pointer, 0, tensor.nbytes), "clearing memory")
        self._finish()

    def _finish(self) -> None:
        """A copy may return before it is done."""
        self._check(self.cuda.cudaStreamSynchronize(0), "waiting for a copy")

    def _check(self, result: tuple, doing: str) -> None:
        if int(result[0]):
            raise RuntimeError(f"CUDA failed while {doing}: {self._reason(result[0])}")

    def _reason(self, status: Any) -> str:
        return self.cuda.cudaGetErrorString(status)[1].decode()
