"""Weights that a card has no room for: they lie in the host's page-locked memory and come while the layer before computes.

A layer's weights of one expert are one piece of memory, copied at once on a stream of its own into one of two buffers. Each
layer that streams has its buffer for good: its parameters are views into it, of the shapes and dtypes that resident ones
have, so nothing is compiled for them. An even number of layers takes turns, so the first ones arrive while the last ones
compute, and the next step finds them there.

Programs that stream are not captured as CUDA graphs: they take longer over the link than the host takes to launch them.
"""

import mmap
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bagel_opt.model.mixture import Mixture
from bagel_opt.model.transformer import Layer, LayerRunner
from bagel_opt.programs.signatures import NEXT
from bagel_opt.runtime.memory_plan import ALIGNED, EXPERTS, MemoryPlan


class Packed:
    """The parameters of some modules one after another in page-locked memory of the host, each in its memory order."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.starts, self.size = [], 0
        for parameter in self.parameters:
            self.starts.append(self.size)
            self.size += -(-parameter.nbytes // ALIGNED) * ALIGNED
        self.shapes = [(p.dtype, p.shape, p.stride(), p.nbytes) for p in self.parameters]
        self.host = page_locked(self.size, device)
        for parameter, place in zip(self.parameters, self._views(self.host), strict=True):
            place.copy_(parameter)
            parameter.data = place  # what it was in is free before the next module is packed

    def bind(self, memory: Tensor) -> None:
        """Makes the parameters views into memory, which holds a copy, or will."""
        for parameter, place in zip(self.parameters, self._views(memory), strict=True):
            parameter.data = place

    def unbind(self, device: torch.device) -> None:
        """Leaves the parameters without memory."""
        for parameter in self.parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + count].view(dtype).as_strided(shape, stride)
            for start, (dtype, shape, stride, count) in zip(self.starts, self.shapes, strict=True)
        ]


def page_locked(count: int, device: torch.device) -> Tensor:
    """Bytes of the host that a GPU copies from by itself, or a kernel of it reads. torch's own allocator would round up to a
    power of two. Raises MemoryError."""
    memory = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)
    if device.type == "cuda":
        cuda, place = torch.cuda.cudart(), memory.data_ptr()
        if status := int(cuda.cudaHostRegister(place, count, 0)):
            raise MemoryError(
                f"the host has no {count / 1e6:.0f} MB left that can be page-locked (CUDA's error {status}); use quantization, or "
                "more memory="
            )
        weakref.finalize(memory, cuda.cudaHostUnregister, place).atexit = False  # whoever uses the memory keeps this
    return memory


def as_on_device(memory: Tensor, device: torch.device) -> Tensor:
    """Page-locked memory as a tensor of the GPU, whose kernels read it over the link: what is read once, or few rows of."""
    if device.type != "cuda":
        return memory
    about = {
        "shape": (len(memory),),
        "typestr": "|u1",
        "data": (memory.data_ptr(), False),
        "strides": None,
        "version": 3,
    }
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=about, memory=memory), device=device)


class Ring:
    """Two buffers on the device, which the streamed layers of one expert fill by turns: number n the buffer n % 2."""

    def __init__(self, packed: list[Packed], device: torch.device):
        if len(packed) % 2:
            raise ValueError(f"{len(packed)} layers stream; the number must be even")
        self.packed, self.device, self.held = packed, device, [-1, -1]
        self.buffers = [torch.empty(packed[0].size, dtype=torch.uint8, device=device) for _ in range(2)]
        for number, one in enumerate(packed):
            one.bind(self.buffers[number % 2])
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:
            self.arrived, self.left = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            for event in self.left:  # of whatever had this memory before
                event.record(torch.cuda.current_stream(device))

    def enter(self, number: int) -> None:
        """The layer's weights are there for all that is launched from now on."""
        self._fetch(number)
        self._fetch(number + 1)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[number % 2])

    def leave(self, number: int) -> None:
        """All that reads the layer's weights is launched: the layer after the next may take their place."""
        if self.stream:
            self.left[number % 2].record(torch.cuda.current_stream(self.device))
        self._fetch(number + 2)

    def _fetch(self, number: int) -> None:
        number %= len(self.packed)
        at = number % 2
        if self.held[at] == number:
            return
        self.held[at] = number
        if self.stream:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.left[at])
                self._copy(number, at)
                self.arrived[at].record(self.stream)
        else:
            self._copy(number, at)

    def _copy(self, number: int, at: int) -> None:
        self.buffers[at].copy_(self.packed[number].host, non_blocking=True)


class Streamed:
    """A LayerRunner that has a layer's weights there when `run` runs it. places: of the layers that stream, by expert, the
    ring and the number in it."""

    def __init__(self, run: LayerRunner, places: dict[Layer, dict[str, tuple[Ring, int]]]):
        self.run, self.places = run, places

    def __call__(self, layer: Layer, und: Tensor, gen: Tensor | None, *given: object) -> tuple:
        mine = [where for expert, where in self.places.get(layer, {}).items() if expert == "und" or gen is not None]
        for ring, number in mine:
            ring.enter(number)
        try:
            return self.run(layer, und, gen, *given)
        finally:  # of what fails, too, some may have been launched
            for ring, number in mine:
                ring.leave(number)


def within(run: LayerRunner) -> LayerRunner:
    """A LayerRunner without what brings weights."""
    return run.run if isinstance(run, Streamed) else run


def alike(run: LayerRunner, other: LayerRunner) -> LayerRunner:
    """Another LayerRunner, for which weights come as for the first."""
    return Streamed(other, run.places) if isinstance(run, Streamed) else other


class Visiting:
    """A program whose weights are on the device only while it runs."""

    def __init__(self, program: Callable, packed: Packed, device: torch.device):
        self.program, self.packed, self.device = program, packed, device
        packed.unbind(device)

    def __call__(self, *inputs: Tensor) -> tuple:
        memory = torch.empty(self.packed.size, dtype=torch.uint8, device=self.device)
        memory.copy_(self.packed.host, non_blocking=True)
        self.packed.bind(memory)
        try:
            return self.program(*inputs)
        finally:
            self.packed.unbind(self.device)


def place_layers(model: Mixture, plan: MemoryPlan, run: LayerRunner) -> LayerRunner:
    """Moves weights of layers to where a plan has them, and those that are read over the link. -> how layers are then run"""
    device, places = model.device, {}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what loading left between weights, of which buffers would take pieces
    for expert in EXPERTS:
        streamed = [model.llm.layers[number] for number in plan.streamed[expert]]
        if streamed:
            ring = Ring([Packed([getattr(layer, expert)], device) for layer in streamed], device)
            for number, layer in enumerate(streamed):
                places.setdefault(layer, {})[expert] = ring, number
    for part, module in (("embed", model.llm.embed), ("head", model.llm.lm_head)):
        if part in plan.away:
            packed = Packed([module], device)
            packed.bind(as_on_device(packed.host, device))
    return Streamed(run, places) if places else run


def place_visitors(model: Mixture, plan: MemoryPlan, programs: dict[str, Callable]) -> dict[str, Callable]:
    """Moves the weights of programs that a plan has come and go. -> those programs in place of the given ones"""
    parts = {"vit": model.seeing, "vae_encode": [model.vae.encoder], "vae_decode": [model.vae.decoder]}
    found = {}
    for name in plan.away & parts.keys():
        packed = Packed(parts[name], model.device)
        for program in (name, name + NEXT):
            if program in programs:
                found[program] = Visiting(programs[program], packed, model.device)
    return found
