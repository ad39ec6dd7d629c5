"""A layer in compiled pieces, the two experts side by side on two streams: the LayerRunner of compiled code on a GPU.

B rows, S cache slots, G key-value heads, D channels per head, K adapters; see model/transformer.py.
"""

import functools
from collections.abc import Callable
from types import ModuleType
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


def norm(part: nn.RMSNorm, x: Tensor) -> Tensor:
    return part(x)


def norm_into(part: nn.RMSNorm, x: Tensor, out: Tensor) -> None:
    out.copy_(part(x))


def reduced(product: Linear, x: Tensor, share_BK: Tensor) -> Tensor:
    return product.low_rank.reduced(x, share_BK)


def whole(product: Linear, x: Tensor) -> Tensor:
    """A product's weight as a kernel takes it."""
    held = product.quantized
    if held is None:
        return product.weight
    from bagel_opt.runtime.int4_products import unpacked  # Triton comes with torch for GPUs alone

    return unpacked(held.codes, held.scale, held.channels, x.dtype)


class Way:
    """An expert's way through a layer: compiled, or for many tokens on Hopper in products that others are fused into.

    fused: whether there are such products in 16 bits. fp8: those of 8-bit floats (runtime/fused_fp8.py), or None.
    """

    def __init__(self, compiled: Callable[..., Callable], fused: bool, fp8: ModuleType | None = None):
        self.fused, self.fp8 = fused, fp8
        self._enter, self._leave, self._to_heads = map(compiled, (enter, leave, to_heads))
        self._norm, self._norm_into, self._reduced = map(compiled, (norm, norm_into, reduced))
        # Products with a single vector become reductions, which read the weights faster than a library's kernels do.
        tuned = {"coordinate_descent_tuning": True}
        self._enter_one, self._leave_one = (compiled(part, options=tuned) for part in (enter, leave))

    def enter(
        self, expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, into: Caches, share_BK: Tensor | None
    ) -> Tensor:
        if self._fuses_codes(expert, x, share_BK):
            return self._to_heads(expert, self.fp8.entered(expert, x), cos, sin, into)
        if not self._fuses(expert, x, share_BK):
            return (self._enter_one if x.shape[:2] == (1, 1) else self._enter)(expert, x, cos, sin, into, share_BK)
        normed, weight = self._taken(expert.norm1, x, expert.qkv, share_BK)
        qkv = fused_products.product(normed, weight, expert.qkv.bias)
        return self._to_heads(expert, qkv.view(*x.shape[:2], -1), cos, sin, into)

    def leave(self, expert: Expert, x: Tensor, attended: Tensor, share_BK: Tensor | None) -> Tensor:
        if self._fuses_codes(expert, x, share_BK):
            return self.fp8.left(expert, x, attended)
        if not self._fuses(expert, x, share_BK):
            return (self._leave_one if x.shape[:2] == (1, 1) else self._leave)(expert, x, attended, share_BK)
        x = self._add(expert.o, x, attended.flatten(2), share_BK)
        normed, weight = self._taken(expert.norm2, x, expert.gate_up, share_BK)
        hidden = fused_products.gated_product(normed, weight).view(*x.shape[:2], -1)
        return self._add(expert.down, x, hidden, share_BK)

    def _taken(self, part: nn.RMSNorm, x: Tensor, product: Linear, share_BK: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a fused product takes: the normed x and the weight, and where adapters are, theirs beside them."""
        adapters = product.low_rank
        if share_BK is None or adapters is None:
            return self._norm(part, x).flatten(0, 1), whole(product, x)
        wide = x.new_empty(*x.shape[:2], adapters.wide.shape[1])
        normed, ranks = wide.split((x.shape[2], wide.shape[2] - x.shape[2]), dim=-1)
        self._norm_into(part, x, normed)
        ranks.copy_(self._reduced(product, normed, share_BK))
        return wide.flatten(0, 1), adapters.wide

    def _add(self, product: Linear, residual: Tensor, x: Tensor, share_BK: Tensor | None) -> Tensor:
        """The residual, and the product with x."""
        sum_MN = residual.flatten(0, 1)
        if share_BK is not None and product.low_rank is not None:
            ranks = self._reduced(product, x, share_BK).flatten(0, 1)
            sum_MN = fused_products.product(ranks, product.low_rank.up_NR, residual_MN=sum_MN)
        return fused_products.product(x.flatten(0, 1), whole(product, x), residual_MN=sum_MN).view(residual.shape)

    def _fuses(self, expert: Expert, x: Tensor, share_BK: Tensor | None) -> bool:
        """Those kernels take weights as they are stored, or unpacked from groups, beside which there is no room for adapters."""
        product = expert.qkv
        if product.quantized is None:
            fits = product.weight.dtype == x.dtype
        else:
            fits = product.quantized.kind == "int4" and share_BK is None
        return self.fused and fits and x.shape[0] * x.shape[1] >= fused_products.LEAST_ROWS

    def _fuses_codes(self, expert: Expert, x: Tensor, share_BK: Tensor | None) -> bool:
        """Those kernels have no room for adapters."""
        weight = expert.qkv.quantized
        mine = weight is not None and weight.kind == "fp8"
        return bool(self.fp8) and mine and share_BK is None and x.shape[0] * x.shape[1] >= fused_products.LEAST_ROWS


class TwoStreams:
    """Runs a layer with FlashAttention.

    The expert of an image's two markers reads as many weights as that of the latents and computes next to nothing with
    them, so it runs beside it, on a stream of its own. Each expert's queries attend by themselves: joining them would
    copy them all.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, codes: bool = False):
        """codes: whether there are weights in 8-bit floats."""
        self.side = torch.cuda.Stream(device, priority=-1)
        fused, fp8 = fused_products.usable(device, dtype), None
        if fused and codes and dtype == torch.bfloat16 and fused_products.usable_fp8(device):
            from bagel_opt.runtime import fused_fp8 as fp8
        self.way = Way(functools.partial(torch.compile, dynamic=False, fullgraph=True), fused, fp8)

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
