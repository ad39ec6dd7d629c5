"""What makes compiled programs fast on a GPU: a layer in compiled pieces on two streams, and whole programs as CUDA graphs.

B rows, T tokens of the understanding expert, N latent tokens, S cache slots; see model/transformer.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bagel_opt.model import cache
from bagel_opt.model.attention import Visible, attend
from bagel_opt.model.transformer import Expert, Layer


def enter(
    expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, start_B: Tensor, offset: int
) -> Tensor:
    """An expert's part before the attention: queries; its keys and values go to slots start + offset onwards."""
    q, k, v = expert.project(x, cos, sin)
    cache.write(k_BSGD, k, start_B + offset)
    cache.write(v_BSGD, v, start_B + offset)
    return q


def leave(expert: Expert, x: Tensor, attended: Tensor) -> Tensor:
    """An expert's part after the attention."""
    return expert.finish(x, attended)


class TwoStreams:
    """Calls a layer with FlashAttention, for Transformer.call_layer.

    The expert of an image's two markers reads as many weights as that of the latents and computes next to nothing with
    them, so it runs beside it, on a stream of its own. Each expert's queries attend by themselves: joining them would
    copy them all.
    """

    def __init__(self, device: torch.device):
        self.side = torch.cuda.Stream(device)
        self.enter, self.leave = (torch.compile(part, dynamic=False, fullgraph=True) for part in (enter, leave))
        # Products with a single vector become reductions, which read the weights faster than a library's kernels do.
        tuned = {"coordinate_descent_tuning": True}
        self.enter_one, self.leave_one = (
            torch.compile(part, dynamic=False, fullgraph=True, options=tuned) for part in (enter, leave)
        )

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
        if gen is None:
            one = und.shape[:2] == (1, 1)
            q = (self.enter_one if one else self.enter)(layer.und, und, cos, sin, k, v, start_B, 0)
            und = (self.leave_one if one else self.leave)(layer.und, und, attend(backend, q, k, v, seen))
            return und, None, k, v
        main, side = torch.cuda.current_stream(), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            q_und = self.enter(layer.und, und, cos, sin, k, v, start_B, 0)
        q_gen = self.enter(layer.gen, gen, cos, sin, k, v, start_B, und.shape[1])
        main.wait_stream(side)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            und = self.leave(layer.und, und, attend(backend, q_und, k, v, seen))
        gen = self.leave(layer.gen, gen, attend(backend, q_gen, k, v, seen))
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
            if isinstance(given, np.ndarray):
                if self.given[i] is not None and np.array_equal(self.given[i], given):
                    continue  # most numbers stay what they were from step to step
                self.given[i], given = given.copy(), torch.from_numpy(given)
            # an array's copy is staged before this returns, and the host does not wait for the device
            self.inputs[i].copy_(given, non_blocking=True)
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)  # the next replay writes to the same memory


class Graphs:
    """The captured programs of a runtime."""

    def __init__(self, programs: dict[str, Callable], device: torch.device):
        self.programs, self.device = programs, device
        self.captured, self.pool = {}, torch.cuda.graph_pool_handle()

    def run(self, program: str, inputs: list[np.ndarray | Tensor], caches: list[Tensor]) -> tuple[Tensor, ...]:
        key = program, *(tuple(x.shape) for x in inputs), caches[0].data_ptr() if caches else 0
        if key not in self.captured:
            tensors = [torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in inputs]
            self.captured[key] = Graph(self.programs[program], tensors, caches, self.pool)
        return self.captured[key](inputs)

    def forget(self, caches: list[Tensor]) -> None:
        """Drops the programs captured for caches that are no more."""
        first = caches[0]
        inside = range(first.data_ptr(), first.data_ptr() + first.nbytes)
        self.captured = {key: graph for key, graph in self.captured.items() if key[-1] not in inside}
