"""A layer in compiled pieces, the two experts side by side on two streams: the LayerRunner of compiled code on a GPU.

A piece takes the tokens of all rows as those of one, so that it is compiled once, whatever the numbers of rows, tokens and
slots. Tokens that are decoded stay rows of one token each, since quantised products treat them otherwise.

B rows, T tokens of a row, M tokens of all rows, R slots of all rows, G key-value heads, D channels per head, K adapters; see
model/transformer.py.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bagel_opt.model.attention import Visible
from bagel_opt.model.linear import Linear
from bagel_opt.model.ops import TorchOps
from bagel_opt.model.transformer import Expert, Layer, angles_of_each
from bagel_opt.runtime import fused_products

OPS = TorchOps("flash")


class Tokens(NamedTuple):
    """What all layers share about an expert's tokens. slot_M: where their keys and values go, among the slots of all rows.
    share: how much of each adapter counts, [1, M, K] or [B, 1, K]."""

    cos: Tensor
    sin: Tensor
    slot_M: Tensor
    share: Tensor | None


class Caches(NamedTuple):
    """A layer's keys and values, the slots of all rows one after another."""

    k_RGD: Tensor
    v_RGD: Tensor


def as_one_row(x_BT: Tensor) -> Tensor:
    """Tokens [B, T, ...] as [1, M, ...], or as they are where each row has one."""
    return x_BT if x_BT.shape[1] == 1 else x_BT.reshape(1, -1, *x_BT.shape[2:])


def store(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, caches: Caches) -> Tensor:
    """Writes keys and values of new tokens, and passes their queries on."""
    for cache_RGD, new in zip(caches, (k, v), strict=True):
        cache_RGD.index_put_((tokens.slot_M,), new.flatten(0, 1).to(cache_RGD.dtype))
    return q


def enter(expert: Expert, x: Tensor, tokens: Tokens, caches: Caches) -> Tensor:
    """An expert's part before the attention: queries; its keys and values are stored."""
    return store(*expert.project(x, tokens.cos, tokens.sin, OPS, tokens.share), tokens, caches)


def to_heads(expert: Expert, qkv: Tensor, tokens: Tokens, caches: Caches) -> Tensor:
    """`enter` after its product."""
    return store(*expert.rotated(*expert.qkv.split(qkv), tokens.cos, tokens.sin, OPS), tokens, caches)


def leave(expert: Expert, x: Tensor, attended: Tensor, share: Tensor | None) -> Tensor:
    """An expert's part after the attention."""
    return expert.finish(x, attended, share)


def norm(part: nn.RMSNorm, x: Tensor) -> Tensor:
    return part(x)


def norm_into(part: nn.RMSNorm, x: Tensor, out: Tensor) -> None:
    out.copy_(part(x))


def reduced(product: Linear, x: Tensor, share: Tensor) -> Tensor:
    return product.low_rank.reduced(x, share)


@functools.cache
def compiled(piece: Callable) -> Callable:
    """The piece, compiled for any number of tokens and of slots, which are the first axis of a tensor that is longer than 1."""
    made = torch.compile(piece, dynamic=False, fullgraph=True)

    def run(*given: Any) -> Any:
        for x in tensors(given):
            axis = next((axis for axis in (0, 1) if x.shape[axis] > 1), None) if x.ndim > 1 else 0
            if axis is not None:
                torch._dynamo.maybe_mark_dynamic(x, axis)
        return made(*given)

    return run


def tensors(given: Iterable) -> Iterable[Tensor]:
    for x in given:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from tensors(x)


def whole(product: Linear, x: Tensor) -> Tensor:
    """A product's weight as a kernel takes it."""
    held = product.quantized
    if held is None:
        return product.weight
    from bagel_opt.runtime.int4_products import unpacked  # Triton comes with torch for GPUs alone

    return unpacked(held.codes, held.scale, held.channels, x.dtype)


def run_pieces(layer: Layer, rows: int, length: int) -> None:
    """Runs every piece that such tokens may take, so that it is compiled: enter and leave, or what stands between products."""
    expert, zeros = layer.gen, layer.gen.norm1.weight.new_zeros
    kv_heads, channels, count = expert.qkv.heads[1], expert.q_norm.weight.shape[0], rows * length
    x = zeros(rows, length, expert.qkv.in_features)
    cos, slot_M = zeros(rows, length, 1, channels // 2, dtype=torch.float32), torch.arange(count, device=x.device)
    caches = Caches(*(zeros(count + 1, kv_heads, channels) for _ in range(2)))
    tokens = Tokens(cos, cos, slot_M, None)
    q = compiled(enter)(expert, x, tokens, caches)
    compiled(leave)(expert, x, q, None)
    if length > 1:
        compiled(norm)(expert.norm1, x)
        compiled(to_heads)(expert, zeros(rows, length, expert.qkv.out_features), tokens, caches)


class Way:
    """An expert's way through a layer: compiled, or for many tokens on Hopper in products that others are fused into.

    fused: whether there are such products in 16 bits. fp8: those of 8-bit floats (runtime/fused_fp8.py), or None.
    """

    def __init__(self, fused: bool, fp8: ModuleType | None = None):
        self.fused, self.fp8 = fused, fp8
        self._enter, self._leave, self._to_heads = map(compiled, (enter, leave, to_heads))
        self._norm, self._norm_into, self._reduced = map(compiled, (norm, norm_into, reduced))

    def enter(self, expert: Expert, x: Tensor, tokens: Tokens, caches: Caches) -> Tensor:
        if self._fuses_codes(expert, x, tokens.share):
            return self._to_heads(expert, self.fp8.entered(expert, x), tokens, caches)
        if not self._fuses(expert, x, tokens.share):
            return self._enter(expert, x, tokens, caches)
        normed, weight = self._taken(expert.norm1, x, expert.qkv, tokens.share)
        qkv = fused_products.product(normed, weight, expert.qkv.bias)
        return self._to_heads(expert, qkv.view(*x.shape[:2], -1), tokens, caches)

    def leave(self, expert: Expert, x: Tensor, attended: Tensor, share: Tensor | None) -> Tensor:
        if self._fuses_codes(expert, x, share):
            return self.fp8.left(expert, x, attended)
        if not self._fuses(expert, x, share):
            return self._leave(expert, x, attended, share)
        x = self._add(expert.o, x, attended.flatten(2), share)
        normed, weight = self._taken(expert.norm2, x, expert.gate_up, share)
        hidden = fused_products.gated_product(normed, weight).view(*x.shape[:2], -1)
        return self._add(expert.down, x, hidden, share)

    def _taken(self, part: nn.RMSNorm, x: Tensor, product: Linear, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a fused product takes: the normed x and the weight, and where adapters are, theirs beside them."""
        adapters = product.low_rank
        if share is None or adapters is None:
            return self._norm(part, x).flatten(0, 1), whole(product, x)
        wide = x.new_empty(*x.shape[:2], adapters.wide.shape[1])
        normed, ranks = wide.split((x.shape[2], wide.shape[2] - x.shape[2]), dim=-1)
        self._norm_into(part, x, normed)
        ranks.copy_(self._reduced(product, normed, share))
        return wide.flatten(0, 1), adapters.wide

    def _add(self, product: Linear, residual: Tensor, x: Tensor, share: Tensor | None) -> Tensor:
        """The residual, and the product with x."""
        sum_MN = residual.flatten(0, 1)
        if share is not None and product.low_rank is not None:
            ranks = self._reduced(product, x, share).flatten(0, 1)
            sum_MN = fused_products.product(ranks, product.low_rank.up_NR, residual_MN=sum_MN)
        return fused_products.product(x.flatten(0, 1), whole(product, x), residual_MN=sum_MN).view(residual.shape)

    def _fuses(self, expert: Expert, x: Tensor, share: Tensor | None) -> bool:
        """Those kernels take weights as they are stored, or unpacked from groups, beside which there is no room for adapters."""
        product = expert.qkv
        if product.quantized is None:
            fits = product.weight.dtype == x.dtype
        else:
            fits = product.quantized.kind == "int4" and share is None
        return self.fused and fits and x.shape[0] * x.shape[1] >= fused_products.LEAST_ROWS

    def _fuses_codes(self, expert: Expert, x: Tensor, share: Tensor | None) -> bool:
        """Those kernels have no room for adapters."""
        weight = expert.qkv.quantized
        mine = weight is not None and weight.kind == "fp8"
        return bool(self.fp8) and mine and share is None and x.shape[0] * x.shape[1] >= fused_products.LEAST_ROWS


class TwoStreams:
    """Runs a layer with FlashAttention.

    The expert of an image's two markers reads as many weights as that of the latents and computes next to nothing with
    them, so it runs beside it, on a stream of its own. Each expert's queries attend by themselves: joining them would
    copy them all.
    """

    exchange: Any = None

    def __init__(self, device: torch.device, dtype: torch.dtype, codes: bool = False):
        """codes: whether there are weights in 8-bit floats."""
        self.side = torch.cuda.Stream(device, priority=-1)
        fused, fp8 = fused_products.usable(device, dtype), None
        if fused and codes and dtype == torch.bfloat16 and fused_products.usable_fp8(device):
            from bagel_opt.runtime import fused_fp8 as fp8
        self.way = Way(fused, fp8)
        self.shared: tuple = (None,)

    def exchanging(self, exchange: Any) -> "TwoStreams":
        """The same for a part of the latents, whose keys and values go to other ranks (split_layers.Exchange)."""
        other = copy.copy(self)
        other.exchange, other.shared = exchange, (None,)
        return other

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
        if self.shared[0] is not cos:  # a program's first layer
            slots, n_und = k.shape[1], und.shape[1]
            mine, others, route = (cos, sin), None, None
            if gen is not None:
                mine, others = angles_of_each(n_und, cos, sin)
                others = shared_tokens(gen, *others, slots, start_B + n_und, share_BK)
            if self.exchange and others:
                count = len(others.slot_M)
                others = others._replace(slot_M=torch.arange(count, device=gen.device))
                route = self.exchange.route(len(gen), count, slots, start_B + n_und)
            self.shared = cos, shared_tokens(und, *mine, slots, start_B, share_BK), others, route
        way, (_, mine, others, route) = self.way, self.shared
        caches = Caches(*(cache.view(-1, *cache.shape[2:]) for cache in (k, v)))

        def attend(q: Tensor, x: Tensor) -> Tensor:
            attended = ops.attend(q.view(*x.shape[:2], *q.shape[2:]), k, v, seen)
            return as_one_row(attended)

        und_M = as_one_row(und)
        if gen is None:
            q = way.enter(layer.und, und_M, mine, caches)
            return way.leave(layer.und, und_M, attend(q, und), mine.share).view(und.shape), None, k, v
        gen_M = as_one_row(gen)
        main, side = torch.cuda.current_stream(), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side):
            q_und = way.enter(layer.und, und_M, mine, caches)
        if self.exchange is None:
            q_gen = way.enter(layer.gen, gen_M, others, caches)
        else:  # while the others' are on their way, the markers' expert computes
            outbox = self.exchange.outbox(len(others.slot_M), caches.k_RGD)
            q_gen = way.enter(layer.gen, gen_M, others, Caches(*outbox))
            self.exchange.deliver(outbox, route, caches)
        main.wait_stream(side)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # und_M may be main's: held until main waits, or main would write over it
            left_M = way.leave(layer.und, und_M, attend(q_und, und), mine.share)
        gen_M = way.leave(layer.gen, gen_M, attend(q_gen, gen), others.share)
        main.wait_stream(side)
        return left_M.view(und.shape), gen_M.view(gen.shape), k, v


def shared_tokens(
    x_BTC: Tensor, cos: Tensor, sin: Tensor, slots: int, start_B: Tensor, share_BK: Tensor | None
) -> Tokens:
    """Of an expert's tokens, which go to slots start_B onwards of each row. In plain memory order, however many rows: another
    one would be compiled for."""
    rows, length = x_BTC.shape[:2]
    row_B1 = torch.arange(rows, device=start_B.device)[:, None] * slots
    slot_BT = row_B1 + start_B[:, None] + torch.arange(length, device=start_B.device)
    cos, sin = (as_one_row(x.expand(-1, length, -1, -1)).contiguous() for x in (cos, sin))
    share = None if share_BK is None else as_one_row(share_BK[:, None].expand(-1, length, -1)).contiguous()
    return Tokens(cos, sin, slot_BT.flatten(), share)
