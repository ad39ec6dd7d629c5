"""The ONNX Runtime runtime on an NVIDIA GPU. Tensors stay there, and weights lie there once, as inputs of all programs.

ONNX Runtime copies initializers for each session; memory that is bound as an input is used where it is.
"""

import itertools
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from bagel_opt.dtypes import BY_ONNX, DTYPES
from bagel_opt.files.manifest import WEIGHTS, Manifest
from bagel_opt.files.weights import mapped_weights
from bagel_opt.installed import missing
from bagel_opt.programs.interface import as_slice
from bagel_opt.programs.signatures import cache_shape
from bagel_opt.runtime.gpu_memory import DeviceTensor, GpuMemory
from bagel_opt.runtime.onnx import OnnxRuntime, failed, load_session

PROVIDER = "CUDAExecutionProvider"
# Replayed as CUDA graphs: launching their kernels one by one takes longer than many of them do.
GRAPHED = ("decode", "generate")
SDPA_KERNELS = str(
    1 | 2 | 8 | 16
)  # those allowed: flash, memory-efficient, cuDNN (not by default on all GPUs) and math
GRAPH_NUMBERS = itertools.count(1)
SHARED: set[int] = (
    set()
)  # GPUs with memory for the values of all programs but those in graphs, of which each has its own
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}  # as ORT names them


class Bound(NamedTuple):
    """A program with its weights and caches bound, and, if it is replayed as a graph, all its inputs and outputs."""

    binding: ort.IOBinding
    options: ort.RunOptions
    inputs: dict[str, DeviceTensor]
    outputs: dict[str, DeviceTensor]


class OnnxGpuRuntime(OnnxRuntime):
    """Runs a bundle's programs. One runs at a time; a program is loaded when it is first needed."""

    free_rows, free_texts, free_sizes = False, False, False

    def __init__(self, folder: Path, manifest: Manifest, memory: GpuMemory):
        self._prepare(folder, manifest)
        self.memory = memory
        self.running = threading.Lock()
        self.bound: dict[tuple, Bound] = {}
        self.returned: list[list[DeviceTensor]] = []  # caches for the next request
        self.weights = {
            name: memory.from_numpy(array, kind.name) for name, kind, array in mapped_weights(folder / WEIGHTS)
        }

    def active(self) -> dict[str, str]:
        return self._active(f"{self.memory.name}:{self.memory.device}", PROVIDER)

    # ---- memory

    def caches(self, rows: int, slots: int) -> list[DeviceTensor]:
        shape = cache_shape(self.manifest.config, rows, slots)
        with self.running:
            fitting = [number for number, caches in enumerate(self.returned) if caches[0].shape == shape]
            if fitting:
                caches = self.returned.pop(fitting[0])
                for cache in caches:
                    self.memory.clear(cache)
                return caches
            while True:
                try:
                    return [self.memory.zeros(shape, self.manifest.dtype) for _ in self.cache_names]
                except MemoryError:
                    if not self.returned:
                        raise
                    self._forget(self.returned.pop(0)[0])  # of another size, such as another profile's

    def _forget(self, keys: DeviceTensor) -> None:
        """Drops what was bound to caches that are let go, told by the first. The runtimes of all profiles share `bound`
        and `returned`, so both change in place."""
        gone = range(keys.pointer, keys.pointer + keys.nbytes)
        for key in [key for key in self.bound if any(pointer in gone for pointer in key[1:])]:
            del self.bound[key]

    def give_back(self, caches: list[DeviceTensor]) -> None:
        """Kept, with the graphs that were captured with them."""
        with self.running:
            self.returned.append(caches)

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> DeviceTensor:
        return self.memory.zeros(shape, self.manifest.dtype if hidden else "float32")

    def write_row(self, tensor: DeviceTensor, row: int, values: np.ndarray | DeviceTensor) -> DeviceTensor:
        if isinstance(values, DeviceTensor):
            self.memory.copy(tensor[row].pointer, values.pointer, values.nbytes)
        else:
            self.memory.upload(values, tensor[row])
        return tensor

    def clear_row(self, caches: list[DeviceTensor], row: int) -> None:
        for cache in caches:
            self.memory.clear(cache[row])

    def copy_row(self, source: list[DeviceTensor], row: int, target: list[DeviceTensor], to: int, length: int) -> None:
        for a, b in zip(source, target, strict=True):
            if length:
                self.memory.copy(b[to].pointer, a[row].pointer, a[row][:length].nbytes)

    def host(self, tensor: DeviceTensor, row: int | None = None) -> np.ndarray:
        return self.memory.numpy(tensor if row is None else tensor[row])

    # ---- programs

    def run(
        self, program: str, inputs: list, caches: list[DeviceTensor] = (), rows: int | slice | None = None
    ) -> tuple:
        entry, graphed = self.programs[program], program.startswith(GRAPHED)
        caches = [cache[as_slice(rows)] for cache in caches]
        with self.running:
            key = (entry["file"], *(cache.pointer for cache in caches))
            if key not in self.bound:
                self.bound[key] = self._bind(program, entry, caches, graphed)
            bound = self.bound[key]
            for (name, (_, kind)), value in zip(entry["inputs"].items(), inputs, strict=True):
                self._give(bound, name, self.manifest.dtype if kind == "model" else kind, value, graphed)
            for name in entry["outputs"]:
                if not graphed:
                    bound.binding.bind_output(name, self.memory.name, self.memory.device)
            try:
                self.session(program).run_with_iobinding(bound.binding, bound.options)
            except Exception as error:  # ORT's exceptions have no common base
                raise failed(program, error) from None
            if graphed:
                return tuple(bound.outputs.values())
            return tuple(map(_wrapped, bound.binding.get_outputs()[: len(entry["outputs"])]))

    def _bind(self, program: str, entry: dict, caches: list[DeviceTensor], graphed: bool) -> Bound:
        session = self.session(program)
        bound = Bound(session.io_binding(), ort.RunOptions(), {}, {})
        for name in entry["weights"]:
            self._bind_input(bound, name, self.weights[name])
        for output in session.get_outputs()[: len(entry["outputs"])]:
            if graphed:
                bound.outputs[output.name] = self.memory.empty(tuple(output.shape), TYPES[output.type])
                self._bind_output(bound, output.name, bound.outputs[output.name])
            else:  # the order in which they are bound is that in which they come back
                bound.binding.bind_output(output.name, self.memory.name, self.memory.device)
        for name, cache in zip(self.cache_names, caches, strict=False):
            # Input and output are the same memory, so that TensorScatter writes the new entries alone.
            self._bind_input(bound, name, cache)
            self._bind_output(bound, f"{name}.out", cache)
        if graphed:
            bound.options.add_run_config_entry("gpu_graph_id", str(next(GRAPH_NUMBERS)))
        return bound

    def _give(self, bound: Bound, name: str, kind: str, value: np.ndarray | DeviceTensor, graphed: bool) -> None:
        """Binds an input. What comes from the host, and what a graph reads, goes where it went before."""
        there = isinstance(value, DeviceTensor)
        if there and not graphed:
            bound.inputs.pop(name, None)
            self._bind_input(bound, name, value)
            return
        to = bound.inputs.get(name)
        if to is None or to.shape != value.shape:
            to = bound.inputs[name] = self.memory.empty(value.shape, kind)
            self._bind_input(bound, name, to)
        if there:
            self.memory.copy(to.pointer, value.pointer, value.nbytes)
        else:
            self.memory.upload(value, to)

    def _bind_input(self, bound: Bound, name: str, x: DeviceTensor) -> None:
        where = self.memory.name, self.memory.device, DTYPES[x.kind].onnx, x.shape, x.pointer
        bound.binding.bind_input(name, *where)

    def _bind_output(self, bound: Bound, name: str, x: DeviceTensor) -> None:
        where = self.memory.name, self.memory.device, DTYPES[x.kind].onnx, x.shape, x.pointer
        bound.binding.bind_output(name, *where)

    def _load(self, path: Path, entry: dict) -> ort.InferenceSession:
        graphed, options = path.name.startswith(GRAPHED), ort.SessionOptions()
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "0")  # whose weights would have to be constant
        options.enable_mem_pattern = False  # a second run would take one block as large as the first run's together
        if not graphed:
            share_memory(self.memory.device)
            options.add_session_config_entry("session.use_env_allocators", "1")
        provider = {
            "device_id": str(self.memory.device),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",  # float32 is to be exact
            "sdpa_kernel": SDPA_KERNELS,
            "enable_cuda_graph": str(int(graphed)),
        }
        return load_session(path, options, [(PROVIDER, provider)])


def share_memory(device: int) -> None:
    """Lets sessions that ask for it take the memory for their values from one arena, since one program runs at a time."""
    if device not in SHARED:
        kind = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, device, ort.OrtMemType.DEFAULT)
        arena = ort.OrtArenaCfg({"arena_extend_strategy": 1})  # by no more than what is asked for
        ort.create_and_register_allocator_v2(PROVIDER, kind, {"device_id": str(device)}, arena)
        SHARED.add(device)


def _wrapped(value: ort.OrtValue) -> DeviceTensor:
    return DeviceTensor(value.data_ptr(), tuple(value.shape()), BY_ONNX[value.element_type()].name, value)


def usable_memory(device: int) -> GpuMemory:
    """The GPU's memory, once ONNX Runtime can use the GPU.

    Raises ImportError where a package or a CUDA library is missing, ValueError where there is no such GPU.
    """
    ort.set_default_logger_severity(4)  # what fails is raised; what is printed besides is of plans that it tried
    ort.preload_dlls()  # CUDA's and cuDNN's libraries, where pip has installed them
    try:
        return GpuMemory(device)
    except ImportError as error:
        raise missing("a bundle for CUDA", "cuda-bindings", error, "onnx-gpu") from None
