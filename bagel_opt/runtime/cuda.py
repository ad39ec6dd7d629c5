"""What makes compiled programs fast on a GPU: a layer in compiled pieces on two streams, and whole programs as CUDA graphs.

B rows, S cache slots, G key-value heads, D channels per head; see model/transformer.py.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bagel_opt.config import LLMConfig
from bagel_opt.model import cache
from bagel_opt.model.attention import Visible, attend
from bagel_opt.model.transformer import Expert, Layer
from bagel_opt.runtime import hopper


class Caches(NamedTuple):
    """Where a layer's new keys and values go: slots start onwards of each row."""

    k_BSGD: Tensor
    v_BSGD: Tensor
    start_B: Tensor


def store(q: Tensor, k: Tensor, v: Tensor, into: Caches) -> Tensor:
    """Writes keys and values of new tokens, and passes their queries on."""
    cache.write(into.k_BSGD, k, into.start_B)
    cache.write(into.v_BSGD, v, into.start_B)
    return q


def enter(expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, into: Caches) -> Tensor:
    """An expert's part before the attention: queries; its keys and values are stored."""
    return store(*expert.project(x, cos, sin), into)


def to_heads(expert: Expert, qkv: Tensor, cos: Tensor, sin: Tensor, into: Caches) -> Tensor:
    """`enter` after its product."""
    return store(*expert.rotated(*expert.qkv.split(qkv), cos, sin), into)


def leave(expert: Expert, x: Tensor, attended: Tensor) -> Tensor:
    """An expert's part after the attention."""
    return expert.finish(x, attended)


def norm(part: nn.RMSNorm, x: Tensor) -> Tensor:
    return part(x)


class Way:
    """An expert's way through a layer: compiled, or for many tokens on Hopper in products that others are fused into."""

    def __init__(self, compiled: Callable[..., Callable], fused: bool):
        self.fused = fused
        self._enter, self._leave, self._to_heads, self._norm = map(compiled, (enter, leave, to_heads, norm))
        # Products with a single vector become reductions, which read the weights faster than a library's kernels do.
        tuned = {"coordinate_descent_tuning": True}
        self._enter_one, self._leave_one = (compiled(part, options=tuned) for part in (enter, leave))

    def enter(self, expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, into: Caches) -> Tensor:
        if not self._fuses(x):
            return (self._enter_one if x.shape[:2] == (1, 1) else self._enter)(expert, x, cos, sin, into)
        normed = self._norm(expert.norm1, x).flatten(0, 1)
        qkv = hopper.product(normed, expert.qkv.weight, expert.qkv.bias)
        return self._to_heads(expert, qkv.view(*x.shape[:2], -1), cos, sin, into)

    def leave(self, expert: Expert, x: Tensor, attended: Tensor) -> Tensor:
        if not self._fuses(x):
            return (self._leave_one if x.shape[:2] == (1, 1) else self._leave)(expert, x, attended)
        rows = hopper.product(attended.flatten(2).flatten(0, 1), expert.o.weight, residual_MN=x.flatten(0, 1))
        hidden = hopper.gated_product(self._norm(expert.norm2, rows), expert.gate_up.weight)
        return hopper.product(hidden, expert.down.weight, residual_MN=rows).view(x.shape)

    def _fuses(self, x: Tensor) -> bool:
        return self.fused and x.shape[0] * x.shape[1] >= hopper.LEAST_ROWS


class TwoStreams:
    """Calls a layer with FlashAttention, for Transformer.call_layer.

    The expert of an image's two markers reads as many weights as that of the latents and computes next to nothing with
    them, so it runs beside it, on a stream of its own. Each expert's queries attend by themselves: joining them would
    copy them all.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.side = torch.cuda.Stream(device, priority=-1)
        self.way = Way(functools.partial(torch.compile, dynamic=False, fullgraph=True), hopper.usable(device, dtype))

    def __call__(
        self,
        layer: Layer,
        und: Tensor,
        gen: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k: Tensor,
        v: Tensor,
        start_B: Tensor,
        seen: Visible,
        backend: str,
    ) -> tuple:
        way, into = self.way, Caches(k, v, start_B)
        if gen is None:
            q = way.enter(layer.und, und, cos, sin, into)
            return way.leave(layer.und, und, attend(backend, q, k, v, seen)), None, k, v
        main, side = torch.cuda.current_stream(), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            q_und = way.enter(layer.und, und, cos, sin, into)
        q_gen = way.enter(layer.gen, gen, cos, sin, into._replace(start_B=start_B + und.shape[1]))
        main.wait_stream(side)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            und = way.leave(layer.und, und, attend(backend, q_und, k, v, seen))
        gen = way.leave(layer.gen, gen, attend(backend, q_gen, k, v, seen))
        main.wait_stream(side)
        return und, gen, k, v


class Graph:
    """A program captured for one set of shapes and caches. Its intermediate values share memory with other graphs'."""

    def __init__(self, call: Callable, inputs: list[Tensor], caches: list[Tensor], pool: tuple):
        self.inputs = [x.clone() for x in inputs]
        self.given: list[np.ndarray | None] = [None] * len(inputs)  # what came from the host last
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what is not compiled yet; the same keys go to the same slots
            for _ in range(2):
                call(*self.inputs, *caches)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            out = call(*self.inputs, *caches)
        self.outputs = out[: len(out) - len(caches)]

    def __call__(self, inputs: list[np.ndarray | Tensor]) -> tuple[Tensor, ...]:
        for i, given in enumerate(inputs):
            host = isinstance(given, np.ndarray)
            if host and self.given[i] is not None and np.array_equal(self.given[i], given):
                continue  # most numbers stay what they were from step to step
            self.given[i] = given.copy() if host else None
            # an array's copy is staged before this returns, and the host does not wait for the device
            self.inputs[i].copy_(torch.from_numpy(given) if host else given, non_blocking=True)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)  # the next replay writes to the same memory


class Graphs:
    """The captured programs of a runtime."""

    def __init__(self, device: torch.device):
        self.device = device
        self.captured: dict[tuple, Graph] = {}

    def run(self, program: Callable, inputs: list[np.ndarray | Tensor], caches: list[Tensor]) -> tuple[Tensor, ...]:
        where = (caches[0].data_ptr(), caches[0].shape, caches[-1].data_ptr()) if caches else ()
        key = program, *(tuple(x.shape) for x in inputs), where
        if key not in self.captured:
            if not self.captured:
                self.pool = torch.cuda.graph_pool_handle()  # torch drops a pool with the last graph that used it
            tensors = [torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in inputs]
            self.captured[key] = Graph(program, tensors, caches, self.pool)
        return self.captured[key](inputs)

    def forget(self, memory: Tensor) -> None:
        """Drops the programs captured for caches in memory that is to be no more."""
        inside = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
        self.captured = {k: graph for k, graph in self.captured.items() if not (k[-1] and k[-1][0] in inside)}


class CacheMemory:
    """Memory for the KV caches of one batch after another, of whatever size, so that programs captured for caches of a
    size find the next ones of that size at the same place. Batches at the same time get a memory each."""

    def __init__(self, config: LLMConfig, dtype: torch.dtype, device: torch.device):
        self.config, self.dtype, self.device = config, dtype, device
        self.lock, self.kept, self.lent = threading.Lock(), [], {}

    def take(self, rows: int, slots: int, forget: Callable[[Tensor], None]) -> list[Tensor]:
        """Zeroed caches. Calls forget with each memory that it lets go, since it is too small."""
        c = self.config
        shape = 2 * c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim
        size = math.prod(shape)
        with self.lock:
            fitting = [memory for memory in self.kept if memory.numel() >= size]
            while self.kept and not fitting:
                forget(self.kept.pop())  # freed before more is taken
            memory = fitting[0] if fitting else torch.empty(size, dtype=self.dtype, device=self.device)
            self.kept = [other for other in self.kept if other is not memory]
            self.lent[memory.data_ptr()] = memory
        caches = memory[:size].zero_().view(shape)
        return [*caches.unbind()]

    def give_back(self, caches: list[Tensor]) -> None:
        with self.lock:
            self.kept.append(self.lent.pop(caches[0].data_ptr()))
