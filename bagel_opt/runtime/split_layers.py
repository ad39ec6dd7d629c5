"""The latents of a row, shared out over ranks: a flow evaluation of which each rank computes a part.

Every rank has the whole cache. Of each layer it computes the keys and values of its own latents, all ranks gather those, and
its queries attend to all of them. The two markers' expert runs on every rank alike.

B rows, N latents of a row, T of them on a rank, S ranks, M = B * T, G key-value heads, D channels per head, R slots of all
rows, P = S * M.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagel_opt.model.attention import Visible
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.ops import Ops
from bagel_opt.model.transformer import Expert, Layer, angles_of_each
from bagel_opt.runtime.groups import Group
from bagel_opt.runtime.streaming import alike, within
from bagel_opt.runtime.two_streams import Caches, TwoStreams, compiled


class Route(NamedTuple):
    """Where gathered keys and values are, and to which slots of all rows they go."""

    key_P: Tensor
    value_P: Tensor
    slot_P: Tensor


def place(inbox: Tensor, route: Route, caches: Caches) -> None:
    """Writes what was gathered [S * 2 * M, G, D] to the caches."""
    for cache_RGD, source_P in zip(caches, (route.key_P, route.value_P), strict=True):
        cache_RGD.index_put_((route.slot_P,), inbox[source_P])


class Exchange:
    """The new keys and values of a layer, among the ranks of a group. latents: N of the program that runs."""

    def __init__(self, group: Group):
        self.group, self.latents = group, 0

    def mine(self, device: torch.device) -> Tensor:
        """Which latents this rank computes, [T]. Where they do not divide, the last one stands for those past it."""
        length = -(-self.latents // self.group.size)
        return (torch.arange(length, device=device) + self.group.rank * length).clamp(max=self.latents - 1)

    def outbox(self, count: int, cache_RGD: Tensor) -> Tensor:
        """Memory for this rank's keys and values, [2, M, G, D]."""
        return cache_RGD.new_empty(2, count, *cache_RGD.shape[1:])

    def route(self, rows: int, count: int, slots: int, start_B: Tensor) -> Route:
        """start_B: the slot of each row's first latent, of so many that a row has."""
        device, size = start_B.device, self.group.size
        key_SM = torch.arange(size, device=device)[:, None] * 2 * count + torch.arange(count, device=device)
        token_ST = torch.arange(size * (count // rows), device=device).clamp(max=self.latents - 1).view(size, -1)
        row_B = torch.arange(rows, device=device) * slots + start_B
        slot_SBT = row_B[:, None] + token_ST[:, None]
        return Route(key_SM.flatten(), (key_SM + count).flatten(), slot_SBT.flatten())

    def deliver(self, outbox: Tensor, route: Route, caches: Caches) -> None:
        compiled(place)(self.group.gather(outbox).flatten(0, 2), route, caches)

    def whole(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' keys and values, [B, N, G, D]."""
        both_S2BTGD = self.group.gather(torch.stack((k_BTGD, v_BTGD)))
        both_2BNGD = both_S2BTGD.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, : self.latents]
        return both_2BNGD[0], both_2BNGD[1]


def project(expert: Expert, x: Tensor, cos: Tensor, sin: Tensor, ops: Ops, share: Tensor | None) -> tuple:
    return expert.project(x, cos, sin, ops, share)


def finish(expert: Expert, x: Tensor, attended: Tensor, share: Tensor | None) -> Tensor:
    return expert.finish(x, attended, share)


def any_size(piece: Callable) -> Callable:
    """The piece, compiled for any number of rows and tokens."""
    made = torch.compile(piece, dynamic=False, fullgraph=True)

    def run(*given: Any) -> Any:
        for x in given:
            for axis in range(min(2, x.ndim)) if isinstance(x, Tensor) else ():
                torch._dynamo.maybe_mark_dynamic(x, axis)
        return made(*given)

    return run


class SplitLayers:
    """A LayerRunner for a rank's part of the latents."""

    def __init__(self, exchange: Exchange, compiles: bool):
        self.exchange = exchange
        self.project, self.finish = (any_size(piece) if compiles else piece for piece in (project, finish))

    def __call__(
        self,
        layer: Layer,
        und: Tensor,
        gen: Tensor,
        cos: Tensor,
        sin: Tensor,
        k: Tensor,
        v: Tensor,
        start_B: Tensor,
        seen: Visible,
        ops: Ops,
        share: Tensor | None = None,
    ) -> tuple:
        und, markers = und.contiguous(), und.shape[1]
        angles, others = angles_of_each(markers, cos, sin)
        q_und, *mine = self.project(layer.und, und, *angles, ops, share)
        q_gen, *others = self.project(layer.gen, gen, *others, ops, share)
        k, v = (ops.write(cache, new, start_B) for cache, new in zip((k, v), mine, strict=True))
        whole = self.exchange.whole(*others)
        k, v = (ops.write(cache, new, start_B + markers) for cache, new in zip((k, v), whole, strict=True))
        out = ops.attend(torch.cat((q_und, q_gen), dim=1), k, v, seen)
        und, gen = (
            self.finish(expert, x, attended.contiguous(), share)
            for expert, x, attended in ((layer.und, und, out[:, :markers]), (layer.gen, gen, out[:, markers:]))
        )
        return und, gen, k, v


class SplitGenerate:
    """The program "generate" of which a rank computes a part: it takes all latents, and returns its own.
    -> velocity [B, T, L], hidden [B, T, C], then the caches"""

    def __init__(self, model: Mixture, group: Group, compiles: bool, run: Any):
        """run: how layers are run where nothing is split."""
        self.model, self.exchange = model, Exchange(group)
        two = within(run)
        split = two.exchanging(self.exchange) if isinstance(two, TwoStreams) else SplitLayers(self.exchange, compiles)
        self.run = alike(run, split)

    def __call__(self, *tensors: Tensor) -> tuple:
        count = len(tensors) - 2 * len(self.model.llm.layers)
        x_BNL, t, index_BN, position, *others = tensors[:count]
        self.exchange.latents = x_BNL.shape[1]
        token_T = self.exchange.mine(x_BNL.device)
        x_BTL, index_BT = (given.index_select(1, token_T) for given in (x_BNL, index_BN))
        t = t if t.ndim == 1 else t.index_select(1, token_T)
        if position.ndim > 1:  # of two markers, and of each latent
            position = torch.cat((position[..., :2], position[..., 2:].index_select(-1, token_T)), dim=-1)
        inputs = x_BTL, t, index_BT, position, *others
        with self.exchange.group.once("generate"):
            return self.model.through_layers("generate", inputs, tensors[count:], self.run)
