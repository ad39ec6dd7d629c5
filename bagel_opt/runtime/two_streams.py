"""A layer in compiled pieces, the two experts side by side on two streams: the LayerRunner of compiled code on a GPU.

B rows, S cache slots, G key-value heads, D channels per head, K adapters; see model/transformer.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bagel_opt.model.attention import Visible
from bagel_opt.model.linear import Linear
from bagel_opt.model.ops import TorchOps
from bagel_opt.model.transformer import Expert, Layer
from bagel_opt.runtime import fused_products

OPS = TorchOps("flash")


class Caches(NamedTuple):
    """Where a layer's new keys and values go: slots start onwards of each row."""

    k_BSGD: Tensor
    v_BSGD: Tensor
    start_B: Tensor


def store(q: Tensor, k: Tensor, v: Tensor, into: Caches) -> Tensor:
    """Writes keys and values of new tokens, and passes their queries on."""
    OPS.write(into.k_BSGD, k, into.start_B)
    OPS.write(into.v_BSGD, v, into.start_B)
    return q


def enter(expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, into: Caches, share_BK: Tensor | None) -> Tensor:
    """An expert's part before the attention: queries; its keys and values are stored."""
    return store(*expert.project(x, cos, sin, OPS, share_BK), into)


def to_heads(expert: Expert, qkv: Tensor, cos: Tensor, sin: Tensor, into: Caches) -> Tensor:
    """`enter` after its product."""
    return store(*expert.rotated(*expert.qkv.split(qkv), cos, sin, OPS), into)


def leave(expert: Expert, x: Tensor, attended: Tensor, share_BK: Tensor | None) -> Tensor:
    """An expert's part after the attention."""
    return expert.finish(x, attended, share_BK)


def norm(part: nn.RMSNorm, x: Tensor, product: Linear, share_BK: Tensor | None) -> Tensor:
    """What a fused product takes: the normed x, and where adapters are, their ranks beside it."""
    normed = part(x)
    if share_BK is None or product.low_rank is None:
        return normed
    return torch.cat((normed, product.low_rank.reduced(normed, share_BK)), dim=-1)


def with_adapters(residual: Tensor, x: Tensor, product: Linear, share_BK: Tensor) -> Tensor:
    """What a fused product adds, with what adapters add."""
    return residual + product.low_rank(x, share_BK)


class Way:
    """An expert's way through a layer: compiled, or for many tokens on Hopper in products that others are fused into."""

    def __init__(self, compiled: Callable[..., Callable], fused: bool):
        self.fused = fused
        self._enter, self._leave, self._to_heads, self._norm, self._with_adapters = map(
            compiled, (enter, leave, to_heads, norm, with_adapters)
        )
        # Products with a single vector become reductions, which read the weights faster than a library's kernels do.
        tuned = {"coordinate_descent_tuning": True}
        self._enter_one, self._leave_one = (compiled(part, options=tuned) for part in (enter, leave))

    def enter(
        self, expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, into: Caches, share_BK: Tensor | None
    ) -> Tensor:
        if not self._fuses(expert, x):
            return (self._enter_one if x.shape[:2] == (1, 1) else self._enter)(expert, x, cos, sin, into, share_BK)
        normed = self._norm(expert.norm1, x, expert.qkv, share_BK).flatten(0, 1)
        qkv = fused_products.product(normed, _weight(expert.qkv, share_BK), expert.qkv.bias)
        return self._to_heads(expert, qkv.view(*x.shape[:2], -1), cos, sin, into)

    def leave(self, expert: Expert, x: Tensor, attended: Tensor, share_BK: Tensor | None) -> Tensor:
        if not self._fuses(expert, x):
            return (self._leave_one if x.shape[:2] == (1, 1) else self._leave)(expert, x, attended, share_BK)
        x = self._add(expert.o, x, attended.flatten(2), share_BK)
        hidden = self._norm(expert.norm2, x, expert.gate_up, share_BK).flatten(0, 1)
        hidden = fused_products.gated_product(hidden, _weight(expert.gate_up, share_BK)).view(*x.shape[:2], -1)
        return self._add(expert.down, x, hidden, share_BK)

    def _add(self, product: Linear, residual: Tensor, x: Tensor, share_BK: Tensor | None) -> Tensor:
        """The residual, and the product with x."""
        if share_BK is not None and product.low_rank is not None:
            residual = self._with_adapters(residual, x, product, share_BK)
        out = fused_products.product(x.flatten(0, 1), product.weight, residual_MN=residual.flatten(0, 1))
        return out.view(residual.shape)

    def _fuses(self, expert: Expert, x: Tensor) -> bool:
        """Those kernels take weights as they are stored."""
        plain = expert.qkv.weight.dtype == x.dtype
        return self.fused and plain and x.shape[0] * x.shape[1] >= fused_products.LEAST_ROWS


def _weight(product: Linear, share_BK: Tensor | None) -> Tensor:
    """As long as what `norm` gives."""
    return product.weight if share_BK is None or product.low_rank is None else product.low_rank.wide


class TwoStreams:
    """Runs a layer with FlashAttention.

    The expert of an image's two markers reads as many weights as that of the latents and computes next to nothing with
    them, so it runs beside it, on a stream of its own. Each expert's queries attend by themselves: joining them would
    copy them all.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.side = torch.cuda.Stream(device, priority=-1)
        self.way = Way(
            functools.partial(torch.compile, dynamic=False, fullgraph=True), fused_products.usable(device, dtype)
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
        ops: TorchOps,
        share_BK: Tensor | None = None,
    ) -> tuple:
        way, into = self.way, Caches(k, v, start_B)
        if gen is None:
            q = way.enter(layer.und, und, cos, sin, into, share_BK)
            return way.leave(layer.und, und, ops.attend(q, k, v, seen), share_BK), None, k, v
        main, side = torch.cuda.current_stream(), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            q_und = way.enter(layer.und, und, cos, sin, into, share_BK)
        q_gen = way.enter(layer.gen, gen, cos, sin, into._replace(start_B=start_B + und.shape[1]), share_BK)
        main.wait_stream(side)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            und = way.leave(layer.und, und, ops.attend(q_und, k, v, seen), share_BK)
        gen = way.leave(layer.gen, gen, ops.attend(q_gen, k, v, seen), share_BK)
        main.wait_stream(side)
        return und, gen, k, v
