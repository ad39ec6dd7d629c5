"""Whole programs as CUDA graphs, and memory for caches that stays where graphs found it.

Launching the kernels of a step one by one takes longer than many of them do. B rows, S cache slots, G key-value heads, D
channels per head.
"""

import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bagel_opt.config import LLMConfig

MOST = 64  # graphs that are kept, each of some megabytes


class Graph:
    """A program captured for one set of shapes and caches, with which it has run before. Its intermediate values share memory
    with other graphs'."""

    def __init__(self, call: Callable, inputs: list[Tensor], caches: list[Tensor], pool: tuple):
        self.inputs = [x.clone() for x in inputs]
        self.given: list[np.ndarray | None] = [None] * len(inputs)  # what came from the host last
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
    """The captured programs of a runtime. One is captured when its shapes come for the second time: nobody waits for a graph
    that nobody uses, and what had to be compiled has been by then."""

    def __init__(self, device: torch.device):
        self.device = device
        self.captured: dict[tuple, Graph | None] = {}  # None: has run once

    def run(self, program: Callable, inputs: list[np.ndarray | Tensor], caches: list[Tensor]) -> tuple[Tensor, ...]:
        where = (caches[0].data_ptr(), caches[0].shape, caches[-1].data_ptr()) if caches else ()
        key = program, *(tuple(x.shape) for x in inputs), where
        known, graph = key in self.captured, self.captured.pop(key, None)
        if graph is None:
            tensors = [torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in inputs]
            if not known:
                out = program(*tensors, *caches)
                self._keep(key, None)
                return out[: len(out) - len(caches)]
            if not any(self.captured.values()):
                self.pool = torch.cuda.graph_pool_handle()  # torch drops a pool with the last graph that used it
            graph = Graph(program, tensors, caches, self.pool)
        self._keep(key, graph)
        return graph(inputs)

    def _keep(self, key: tuple, graph: Graph | None) -> None:
        """As the one that was used last."""
        self.captured[key] = graph
        while len(self.captured) > MOST:
            del self.captured[next(iter(self.captured))]

    def clear(self) -> None:
        """Drops all programs, whose weights have moved."""
        self.captured = {}

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
