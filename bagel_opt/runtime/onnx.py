"""The ONNX Runtime runtime on the CPU. Tensors are NumPy arrays; caches are updated in the memory they lie in."""

import copy
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bagel_opt.errors import BundleError, reason
from bagel_opt.files.manifest import WEIGHTS, Manifest
from bagel_opt.files.weights import Location, locate_weights
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import as_slice
from bagel_opt.programs.signatures import cache_names, cache_shape
from bagel_opt.runtime.active import active
from bagel_opt.runtime.free_memory import free_memory
from bagel_opt.runtime.memory_plan import needs

# Of weights in 4 bits the copy that ONNX Runtime makes is larger than what lies in the file: scales are in float32, and
# each has a sum beside it. Others are as large.
COPY_OF_CODES = 1.6
log = logging.getLogger("bagel_opt")
# One arena for the values of all programs, of which one runs at a time. It grows in powers of two: sizes vary, and one
# that grows by what is asked for keeps a piece of its own for each.
ort.create_and_register_allocator(
    ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT),
    ort.OrtArenaCfg({"arena_extend_strategy": 0}),
)


def threads() -> int:
    """As many as OMP_NUM_THREADS allows, which Ray sets to a replica's share; else the cores that this process may use.
    Left to itself ONNX Runtime takes all of the machine's and pins a thread to each."""
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(given):
        return int(given)
    try:
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # of which each core computes for one
        return len({Path(siblings.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except (OSError, AttributeError):  # not on Linux
        return os.cpu_count() or 1


def lacks_memory(error: Exception) -> bool:
    """Whether ONNX Runtime's exception says so, which has no kind of its own."""
    return any(text in str(error) for text in ("bad_alloc", "bad allocation", "Failed to allocate memory"))


def failed(program: str, error: Exception) -> Exception:
    """What a runtime raises where a program fails."""
    if lacks_memory(error):
        return MemoryError(
            f"memory is full (program {program!r}); use a smaller height and width or fewer requests at a time"
        )
    return RuntimeError(f"ONNX Runtime failed in program {program!r}: {reason(error)}")


def load_session(path: Path, options: ort.SessionOptions, providers: list) -> ort.InferenceSession:
    """A program that runs on the first of the providers, and on no other. Raises BundleError, MemoryError, and ImportError
    where the provider's own libraries cannot be loaded."""
    options.log_severity_level = 3
    # A pool of threads for each program, since one for all of a process is the process's: no session with its own could
    # be made any more. Those of the last program would still spin while the next one runs, and take its cores: flow steps
    # of a small model took three times as long.
    options.intra_op_num_threads = threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")  # beside others on busy cores
    try:
        # What is left out makes a Split of two Slices: slower on a GPU, and wrong in a graph (export/onnx_fused.py).
        session = ort.InferenceSession(
            path, options, providers=providers, disabled_optimizers=["GatherSliceToSplitFusion"]
        )
    except Exception as error:  # ORT's exceptions have no common base
        if lacks_memory(error):
            raise MemoryError(
                f"memory is full (program {path.stem!r} cannot be loaded); end other programs, or export the bundle with quantization"
            ) from None
        raise BundleError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {reason(error)}") from None
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise ImportError(
            f"ONNX Runtime {ort.__version__} cannot load its {wanted}: libraries of CUDA or cuDNN are missing here, or of "
            "another version than it was built for; install them with pip install 'bagel-opt[onnx-gpu]'"
        )
    return session


class OnnxRuntime:
    """Runs a bundle's programs. A program is loaded when it is first needed; all share the mapped file of the weights.
    ONNX Runtime copies those of linear layers for the programs in which they are constant (export/onnx_graph.py, PACKED).
    Where memory is too short for the copies of all, those of others leave before a program is loaded."""

    adapters = None
    free_rows, free_texts, free_sizes = True, False, False

    def __init__(self, folder: Path, manifest: Manifest):
        self._prepare(folder, manifest)
        with (folder / WEIGHTS).open("rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        places = locate_weights(folder / WEIGHTS)
        self.weights = {name: self._value(at) for name, at in places.items()}
        self.copies = {
            name: int(at.length * (COPY_OF_CODES if at.dtype.name == "uint8" else 1)) for name, at in places.items()
        }
        self.held: dict[str, int] = {}  # by file: bytes of a program's copies

    def _value(self, at: Location) -> ort.OrtValue:
        """A tensor of the mapped file. NumPy has no bfloat16 by itself."""
        kind = "uint16" if at.dtype.name == "bfloat16" else at.dtype.name
        array = np.frombuffer(self.mapped, kind, prod(at.shape), at.offset).reshape(at.shape)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, at.dtype.onnx)

    def ahead(self, values: np.ndarray) -> np.ndarray:
        return values

    def active(self) -> dict[str, str]:
        return self._active(f"cpu, {threads()} threads", "CPUExecutionProvider")

    def _active(self, device: str, provider: str) -> dict[str, str]:
        m = self.manifest
        return active(
            f"onnxruntime {ort.__version__}, {provider}", m.kind, device, m.dtype, m.attention, m.quantization
        )

    def _prepare(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.dtype = folder, manifest, manifest.dtype
        self.cache_names = cache_names(manifest.config)
        self.profile = manifest.profiles[0]
        self.programs = manifest.programs[self.profile.name]
        self.sessions: dict[str, ort.InferenceSession] = {}  # by file
        self.lock = threading.Lock()

    def for_profile(self, profile: Profile) -> "OnnxRuntime":
        other = copy.copy(self)
        other.profile, other.programs = profile, self.manifest.programs[profile.name]
        return other

    def session(self, program: str) -> ort.InferenceSession:
        entry = self.programs[program]
        with self.lock:
            if entry["file"] not in self.sessions:
                session = self._load(self.folder / entry["file"], entry)
                self._check(self.folder / entry["file"], entry, session)
                self.sessions[entry["file"]] = session
            return self.sessions[entry["file"]]

    def _check(self, path: Path, entry: dict, session: ort.InferenceSession) -> None:
        """That a file holds the program that the manifest says. Raises BundleError."""
        caches = self.cache_names if entry["cache_rows"] else []
        takes = {x.name for x in session.get_inputs()} - set(entry["weights"])
        gives = {x.name for x in session.get_outputs()}
        if takes != {*entry["inputs"], *caches} or gives != {*entry["outputs"], *(f"{name}.out" for name in caches)}:
            raise BundleError(f"{path} is not the program that the manifest tells of; copy or export the bundle again")

    def _make_room(self, path: Path, entry: dict) -> None:
        """Drops programs with copies of weights, those with most first, until there is memory for another's. To load one again
        takes seconds, as much as some tokens; where memory ends, the system ends the process."""
        m = self.manifest
        copied = sum(self.copies[name] for name in entry["weights"])  # or less: it is known once the program is loaded
        wanted = sum(needs(m.config, self.profile, m.dtype, copied, m.quantization).values())
        while copied and self.held and (free := free_memory()) is not None and free < wanted:
            most = max(self.held, key=self.held.get)
            log.info("memory is short: %s is dropped for %s, and loaded again when it is needed", most, path.name)
            self.sessions.pop(most, None)
            del self.held[most]

    def _load(self, path: Path, entry: dict) -> ort.InferenceSession:
        self._make_room(path, entry)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.use_env_allocators", "1")
        for name in entry["weights"]:
            options.add_initializer(name, self.weights[name])
        session = load_session(path, options, ["CPUExecutionProvider"])
        if hasattr(mmap, "MADV_DONTNEED"):  # what was copied from the file, which takes its place, is not needed again
            self.mapped.madvise(mmap.MADV_DONTNEED)
        constant = set(entry["weights"]) - {value.name for value in session.get_overridable_initializers()}
        if constant:
            self.held[path.name] = sum(self.copies[name] for name in constant)
        return session

    def close(self) -> None:
        """Nothing is held but memory."""

    def caches(self, rows: int, slots: int) -> list[np.ndarray]:
        shape = cache_shape(self.manifest.config, rows, slots)
        return [np.zeros(shape, self.dtype) for _ in self.cache_names]

    def give_back(self, caches: list[np.ndarray]) -> None:
        """They are not kept."""

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> np.ndarray:
        return np.zeros(shape, self.dtype if hidden else "float32")

    def write_row(self, tensor: np.ndarray, row: int, values: np.ndarray) -> np.ndarray:
        tensor = tensor.copy()  # what a program returned may be ONNX Runtime's own memory
        tensor[row, : len(values)] = values
        return tensor

    def clear_row(self, caches: list, row: int) -> None:
        for cache in caches:
            cache[row] = 0

    def copy_row(self, source: list, row: int, target: list, to: int, length: int) -> None:
        for a, b in zip(source, target, strict=True):
            b[to, :length] = a[row, :length]

    def run(self, program: str, inputs: list, caches: list[np.ndarray] = (), rows: int | slice | None = None) -> tuple:
        session, entry = self.session(program), self.programs[program]
        binding = session.io_binding()
        for (name, (_, kind)), value in zip(entry["inputs"].items(), inputs, strict=True):
            kind = self.dtype if kind == "model" else kind
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, kind))
            binding.bind_ortvalue_input(name, value)
        for name in entry["outputs"]:
            binding.bind_output(name, "cpu")
        for name, cache in zip(self.cache_names, caches, strict=False):
            # Input and output are the same memory, so that TensorScatter writes the new entries alone.
            shared = ort.OrtValue.ortvalue_from_numpy(cache[as_slice(rows)])
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(f"{name}.out", shared)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ORT's exceptions have no common base
            raise failed(program, error) from None
        return tuple(value.numpy() for value in binding.get_outputs()[: len(entry["outputs"])])

    def chosen(self, ids_B: Any) -> tuple[Callable[[], np.ndarray], None]:
        return functools.partial(self.host, ids_B), None

    def host(self, tensor: np.ndarray, row: int | None = None) -> np.ndarray:
        tensor = tensor if row is None else tensor[row]
        return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor
