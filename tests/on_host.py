"""Bundles of ONNX for CUDA on the CPU: in float32, and with the host's memory for the GPU's."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from bagel_opt.api import Model
from bagel_opt.export import bundle
from bagel_opt.export import onnx as exporter
from bagel_opt.files.manifest import TOKENIZER, read_manifest
from bagel_opt.runtime.gpu_memory import GpuMemory
from bagel_opt.runtime.onnx import load_session
from bagel_opt.runtime.onnx_gpu import OnnxGpuRuntime
from bagel_opt.tokenizer import Tokenizer


@contextlib.contextmanager
def in_float32(fused: bool = True) -> Iterator[None]:
    """Exports for CUDA in float32 have the operators that are for 16 bits meanwhile, or not, and may be quantised."""
    shapes = exporter.Shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "Shapes", lambda *settings, **more: shapes(*settings[:3], fused, *settings[4:], **more))
        patch.setattr(bundle, "fits_onnx", lambda *_: True)
        yield


def on_host(folder: Path) -> Model:
    manifest = read_manifest(folder)
    runtime = OnHost(folder, manifest, HostMemory())
    return Model(runtime, manifest.config, Tokenizer(folder / TOKENIZER), manifest.profiles)


class HostMemory(GpuMemory):
    """What GpuMemory does, with the host's memory."""

    name = "cpu"

    def __init__(self):
        self.device, self.held = 0, {}
        self.left = None  # bytes until it is full

    def allocate(self, count):
        if self.left is not None and count > self.left:
            raise MemoryError("full")
        if self.left is not None:
            self.left -= count
        block = np.full(count, 255, np.uint8)  # whoever reads what nobody wrote gets NaN
        self.held[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, pointer):
        block = self.held.pop(pointer)
        block[:] = 255
        if self.left is not None:
            self.left += len(block)

    def copy(self, to, source, count):
        ctypes.memmove(to, source, count)

    def clear(self, tensor):
        ctypes.memset(tensor.pointer, 0, tensor.nbytes)


class OnHost(OnnxGpuRuntime):
    def _load(self, path, entry):
        return load_session(path, ort.SessionOptions(), ["CPUExecutionProvider"])
