"""Decoding with the weights of the understanding expert shared out over ranks: each multiplies with its own heads' and its own
channels' part, and so reads as much less (tensor parallelism, arXiv 1909.08053).

A rank has its queries' heads and the columns of `o` that they enter, its channels of the MLP, and its part of the vocabulary.
Keys and values are computed by all alike, since each has the whole cache: that is 1.6% of a layer's weights. What the parts
add to a token is rounded to the model's dtype and added up in float32 in the order of ranks, the same on all.

B rows, one token each, C hidden channels, H and G heads of queries and of keys and values on a rank, D channels per head, S
slots, W ranks, V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bagel_opt.config import LLMConfig
from bagel_opt.model.attention import Visible
from bagel_opt.model.linear import Linear, Span, stored
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.ops import Ops
from bagel_opt.model.transformer import Expert, Layer, LayerRunner
from bagel_opt.runtime.groups import Group
from bagel_opt.runtime.split_layers import any_size
from bagel_opt.runtime.streaming import alike


class Slices(NamedTuple):
    """A rank's parts of an expert's weights, in the memory of the whole ones. q_kv, gate_up: spans of the channels out."""

    q_kv: tuple[Span, Span]
    o: Tensor
    gate_up: tuple[Span, Span]
    down: Tensor


def sliced(expert: Expert, c: LLMConfig, group: Group) -> Slices:
    heads, inner = c.num_attention_heads * c.head_dim, c.intermediate_size
    q, gate = ((group.rank * n // group.size, (group.rank + 1) * n // group.size) for n in (heads, inner))
    q_kv, up = (q, (heads, expert.qkv.out_features)), (inner + gate[0], inner + gate[1])
    return Slices(q_kv, expert.o.weight[:, slice(*q)], (gate, up), expert.down.weight[:, slice(*gate)])


def product(of: Linear, x: Tensor, weight: Tensor) -> Tensor:
    """With a part of the weight, as the whole one is multiplied with."""
    return of.multiply(x, stored(weight, x), None)


def products(of: Linear, x: Tensor, spans: tuple[Span, Span]) -> tuple[Tensor, ...]:
    return of.multiply(x, of.weight, of.bias, spans).split([end - start for start, end in spans], dim=-1)


def enter(
    expert: Expert,
    mine: Slices,
    x_B1C: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    start_B: Tensor,
    ops: Ops,
) -> Tensor:
    """This rank's queries; all keys and values are stored."""
    normed, channels = expert.norm1(x_B1C), expert.q_norm.weight.shape[0]
    q, kv = (y.unflatten(-1, (-1, channels)) for y in products(expert.qkv, normed, mine.q_kv))
    k, v = kv.chunk(2, dim=2)
    q, k, v = expert.rotated(q, k, v, cos, sin, ops)
    for cache, new in ((k_BSGD, k), (v_BSGD, v)):
        ops.write(cache, new, start_B)
    return q


def attended_part(expert: Expert, mine: Slices, attended_B1HD: Tensor) -> Tensor:
    return product(expert.o, attended_B1HD.flatten(2), mine.o)


def mlp_part(expert: Expert, mine: Slices, x_B1C: Tensor) -> Tensor:
    gate, up = products(expert.gate_up, expert.norm2(x_B1C), mine.gate_up)
    return product(expert.down, F.silu(gate) * up, mine.down)


class SplitWeights:
    """A LayerRunner for tokens of the understanding expert alone, one per row."""

    def __init__(self, config: LLMConfig, group: Group, compiles: bool):
        self.config, self.group = config, group
        self.slices: dict[Layer, Slices] = {}
        pieces = enter, attended_part, mlp_part
        self.pieces = [any_size(piece) if compiles else piece for piece in pieces]

    def __call__(
        self,
        layer: Layer,
        und: Tensor,
        gen: None,
        cos: Tensor,
        sin: Tensor,
        k: Tensor,
        v: Tensor,
        start_B: Tensor,
        seen: Visible,
        ops: Ops,
        share: None = None,
    ) -> tuple:
        if layer not in self.slices:
            self.slices[layer] = sliced(layer.und, self.config, self.group)
        mine, expert, heads = self.slices[layer], layer.und, k.shape[2] // self.group.size
        mine_alone = slice(self.group.rank * heads, (self.group.rank + 1) * heads)
        enter, attended_part, mlp_part = self.pieces
        q = enter(expert, mine, und, cos, sin, k, v, start_B, ops)
        attended = ops.attend(q, k[:, :, mine_alone], v[:, :, mine_alone], seen)
        und = self.group.add(und, attended_part(expert, mine, attended))
        return self.group.add(und, mlp_part(expert, mine, und)), None, k, v


def all_logits(head: Linear, x_BC: Tensor, group: Group) -> Tensor:
    """Logits [B, V], of which each rank computes a part of the vocabulary; the last ones may have less, or none."""
    rows = -(-head.out_features // group.size)
    logits = product(head, x_BC, head.weight[group.rank * rows : (group.rank + 1) * rows])
    parts_WBV = group.gather(F.pad(logits, (0, rows - logits.shape[1])))
    return parts_WBV.transpose(0, 1).flatten(1)[:, : head.out_features]


class SplitDecode:
    """The program "decode" of which each rank reads its part of the weights. -> logits [B, V] on all, then the caches"""

    def __init__(self, model: Mixture, group: Group, compiles: bool, run: LayerRunner):
        """run: how layers are run where nothing is split."""
        self.model, self.group = model, group
        self.split = SplitWeights(model.config.llm, group, compiles)
        self.run = alike(run, self.split)

    def __call__(self, *tensors: Tensor) -> tuple:
        model = self.model
        count = len(tensors) - 2 * len(model.llm.layers)
        started = model.start("decode", tensors[:count], tensors[count].shape[1])
        with self.group.once("decode"):
            und_B1C, _, new = model.llm(started, tensors[count:], model.ops, self.run)
            logits_BV = all_logits(model.llm.lm_head, model.llm.norm_und(und_B1C[:, 0]), self.group)
        return logits_BV.float(), *new

    def forget(self) -> None:
        """Weights may have moved."""
        self.split.slices.clear()


def undivided(model: Mixture, ranks: int) -> str | None:
    """Why weights cannot be shared out over so many ranks, or None."""
    c = model.config.llm
    sizes = {"key-value heads": c.num_key_value_heads, "channels of the MLP": c.intermediate_size}
    for name, size in sizes.items():
        if size % ranks:
            return f"{size} {name} do not divide by {ranks}"
    if kinds := {part: kind for part, kind in model.kinds.items() if part in ("und", "head")}:
        return f"weights in {', '.join(sorted(set(kinds.values())))} cannot be taken apart"
    return None
