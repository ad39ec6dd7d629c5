"""The torch runtime: runs a model that runtime/torch_setup.py has prepared."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagel_opt.files.adapters import Named, named
from bagel_opt.model.kv_cache import empty_cache
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import as_slice, slots_in_use
from bagel_opt.programs.signatures import ONE_ROW, ROW
from bagel_opt.runtime.active import torch_active
from bagel_opt.runtime.adapters import attach, read_adapters
from bagel_opt.runtime.cuda_graphs import CacheMemory, Graphs
from bagel_opt.runtime.memory_full import memory_full
from bagel_opt.runtime.memory_plan import MemoryPlan
from bagel_opt.runtime.torch_setup import Prepared

_FLAGS = threading.Lock()
NO_ADAPTERS = (
    "adapters kept apart go beside weights that stay on the device, and with memory= some do not; merge them: lora="
)
STAGED = 2**16  # bytes, up to which CUDA stages a copy by itself
# Programs that run again and again with few shapes. Prefill of patches launches its kernels itself. So do texts of more tokens
# than SHORT, since computing takes longer, and of several rows, of which hardly any come together twice.
GRAPHED = {"step", "vit", *ONE_ROW, *(name + ROW for name in ONE_ROW)}
SHORT = 512


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Without TF32, to which torch lets convolutions round float32 on CUDA: the VAE would be 1e-3 off.

    The setting, like the choice of an SDPA backend, is the process's, so only one thread at a time may have it. So
    no two threads use a CUDA graph's memory at once, either.
    """
    with _FLAGS, torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
        yield


class TorchRuntime:
    """Runs the programs of a prepared model."""

    plan: MemoryPlan | None = None
    adapters: Mapping[str, float] | None = MappingProxyType({})

    def __init__(self, prepared: Prepared):
        model = self.model = prepared.model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.programs, self.free_rows, self.free_sizes = prepared.programs, prepared.free_rows, prepared.free_sizes
        self.free_texts = prepared.free_rows
        self.fixed_slots, self.spare_slots = prepared.fixed_slots, prepared.spare_slots
        self.widen, self.backend = prepared.widen, "compile" if prepared.compiled else "eager"
        self.plan = prepared.plan
        self._replay(prepared.graphs)

    def set_adapters(self, adapters: Named) -> None:
        """As `Model.set_adapters`. Bad ones change nothing."""
        found = named(adapters)
        if found and self.plan:
            raise ValueError(NO_ADAPTERS)
        read = read_adapters([place for place, _ in found.values()], self.config)
        try:
            moved = attach(self.model, read, self.widen)
        except BaseException:  # of the device's memory, or of a file that went away
            moved = attach(self.model, [], self.widen)
            found = {}
            raise
        finally:
            self.adapters = {name: factor for name, (_, factor) in found.items()}
            if moved and self.graphs:
                self.graphs.clear()

    def active(self) -> dict[str, str]:
        model = self.model
        return torch_active(self.backend, self.device, self.dtype, model.ops.backend, model.kinds)

    def _replay(self, graphs: bool) -> None:
        """Whether programs are replayed as CUDA graphs; caches then stay in place."""
        self.graphs = Graphs(self.device) if graphs else None
        self.graphed = set(GRAPHED)
        self.memory = CacheMemory(self.config.llm, self.dtype, self.device) if graphs else None

    def for_profile(self, profile: Profile) -> "TorchRuntime":
        """Its programs take any shape. Raises ProfileError where the plan for the device's memory has no room for it."""
        if self.plan:
            self.plan.check(profile)
        return self

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        if self.graphs:
            return self._within_memory("caches", lambda: self.memory.take(rows, slots, self.graphs.forget))
        c = self.config.llm
        sizes = c.num_hidden_layers, rows, slots + self.spare_slots, c.num_key_value_heads, c.head_dim
        return self._within_memory("caches", lambda: empty_cache(*sizes, dtype=self.dtype, device=self.device))

    def give_back(self, caches: list[Tensor]) -> None:
        """Kept where programs have been captured with them."""
        if self.graphs:
            self.memory.give_back(caches)

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> Tensor:
        dtype = self.dtype if hidden else torch.float32
        return self._within_memory("values of a request", lambda: torch.zeros(shape, dtype=dtype, device=self.device))

    def write_row(self, tensor: Tensor, row: int, values: np.ndarray | Tensor) -> Tensor:
        tensor[row, : len(values)] = self._tensor(values)
        return tensor

    def clear_row(self, caches: list, row: int) -> None:
        for cache in caches:
            cache[row] = 0

    def copy_row(self, source: list[Tensor], row: int, target: list[Tensor], to: int, length: int) -> None:
        for a, b in zip(source, target, strict=True):
            b[to, :length] = a[row, :length]

    def run(self, program: str, inputs: list, caches: list[Tensor] = (), rows: int | slice | None = None) -> tuple:
        return self._within_memory(f"program {program!r}", lambda: self._run(program, inputs, caches, rows))

    def _within_memory(self, doing: str, call: Callable[[], Any]) -> Any:
        """The result. Where memory is full, all that is kept for later calls is given back and it is tried once more.
        Raises MemoryError."""
        for _ in range(2):
            try:
                return call()
            except RuntimeError as error:  # which holds what had been computed, until here
                place = memory_full(error)
                if not place:
                    raise
            self.free_memory()
        other = {
            "host": "quantization=, --quantization, and the weights take less",
            "GPU": f"{'less' if self.plan else 'some'} memory=, --memory, and more of the weights stay on the host",
        }
        raise MemoryError(
            f"the {place}'s memory is full ({doing}); use a smaller height and width or fewer requests at a time, or load with "
            f"{other[place]}"
        )

    def free_memory(self) -> None:
        """Gives back all that is kept for later calls."""
        if self.graphs:
            self.graphs.clear()
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing is held but memory."""

    def _run(self, program: str, inputs: list, caches: list[Tensor], rows: int | slice | None) -> tuple:
        if caches:
            slots = caches[0].shape[1]
            if not self.fixed_slots:
                slots = slots_in_use(inputs, inputs[-2 if self.adapters else -1], slots)
            caches = [cache[as_slice(rows), :slots] for cache in caches]
        alone = self.device.type == "cuda" or self.plan  # one thread at a time
        with torch.no_grad(), _exact() if alone else contextlib.nullcontext():
            if self.graphs and self._replays(program, inputs):
                return self.graphs.run(self.programs[program], inputs, caches)
            out = self.programs[program](*map(self._tensor, inputs), *caches)
        return out[: len(out) - len(caches)]

    def _replays(self, program: str, inputs: list) -> bool:
        """Whether a program is captured. None is whose weights come and go."""
        if self.plan and (self.plan.streams_in(program) or program in self.plan.away):
            return False
        if program == "text":
            rows, length = inputs[0].shape
            return rows == 1 and length <= SHORT
        return program in self.graphed

    @functools.cached_property
    def _copies(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def ahead(self, values: np.ndarray) -> Tensor | np.ndarray:
        """On a GPU by a stream of its own, so that the copy waits for nothing that was launched. Values that find no room stay."""
        if self.device.type != "cuda":
            return values
        try:
            with torch.cuda.stream(self._copies):
                tensor = torch.from_numpy(values).to(self.device)
        except torch.OutOfMemoryError:
            return values
        self._copies.synchronize()
        tensor.record_stream(torch.cuda.default_stream(self.device))
        return tensor

    def _tensor(self, values: np.ndarray | Tensor) -> Tensor:
        """On the device. The copy is staged, so the host need not wait for what the device still has to do."""
        if not isinstance(values, np.ndarray):
            return values
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda" and tensor.nbytes > STAGED:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def chosen(self, ids_B: Tensor) -> tuple[Callable[[], np.ndarray], Tensor | None]:
        if self.device.type != "cuda":
            return functools.partial(self.host, ids_B), None
        there, over = torch.empty(ids_B.shape, dtype=ids_B.dtype, pin_memory=True), torch.cuda.Event()
        there.copy_(ids_B, non_blocking=True)
        over.record(torch.cuda.current_stream(self.device))

        def wait() -> np.ndarray:
            over.synchronize()
            return there.numpy()

        return wait, ids_B.clamp(min=0)  # where there is none, any

    def host(self, tensor: Tensor, row: int | None = None) -> np.ndarray:
        tensor = tensor if row is None else tensor[row]
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
