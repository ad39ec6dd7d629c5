"""The model's products with weights, and its tables: what a checkpoint fills.

B rows, T tokens, C channels in, N channels out, V rows of a table, K adapters, R ranks of all of them together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.model.quantized import Quantized

Span = tuple[int, int]  # from one channel to before another


class LowRank(nn.Module):
    """What adapters kept apart add to a product (LoRA, arXiv 2106.09685): the factors of all of them side by side.

    channels: in and out. down_RC, up_NR: the factors. of_R: which adapter each rank is of. A rank of no adapter has zeros in both factors.
    wide: weight and up_NR side by side, for a product that takes both at once; see `widen`.
    """

    def __init__(self, ranks: int, channels: tuple[int, int], dtype: torch.dtype, device: torch.device):
        super().__init__()
        c_in, c_out = channels
        for name, shape in (("down_RC", (ranks, c_in)), ("up_NR", (c_out, ranks))):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("of_R", torch.zeros(ranks, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("wide", None, persistent=False)

    def reduced(self, x_BTC: Tensor, share_BK: Tensor) -> Tensor:
        """x in the adapters' ranks, each as much as its adapter counts in that row, or of share_BTK with that token:
        [B, T, R]."""
        share = share_BK.index_select(-1, self.of_R)
        share = share[:, None] if share.ndim == 2 else share
        return F.linear(x_BTC, self.down_RC) * share.to(x_BTC.dtype)

    def forward(self, x_BTC: Tensor, share_BK: Tensor) -> Tensor:
        return F.linear(self.reduced(x_BTC, share_BK), self.up_NR)


def stored(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter as a product with x takes it."""
    return parameter if parameter.dtype == x.dtype else parameter.to(x.dtype)


def product(x: Tensor, weight_NC: Tensor, bias_N: Tensor | None, spans: Sequence[Span] = ()) -> Tensor:
    """F.linear; of some spans of the channels out alone, side by side, if there are any."""
    parts = [
        F.linear(x, *(None if whole is None else stored(whole[a:b], x) for whole in (weight_NC, bias_N)))
        for a, b in spans
    ]
    return torch.cat(parts, dim=-1) if parts else F.linear(x, weight_NC, bias_N)


class Linear(nn.Linear):
    """x @ weight.T + bias, in the dtype of x: the weight may be stored in another one.

    Every product of the model is one of these, so that what is stored in its place, such as a quantised or an adapted
    weight, is a matter of this file alone. quantized: holds the weight where there is none, see `quantize`. low_rank: of
    adapters that are kept apart; runtime/adapters.py brings it.
    """

    quantized: Quantized | None
    low_rank: LowRank | None
    multiply = staticmethod(product)  # with a weight as it is; a runtime may bring a faster one

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: str | None = None):
        super().__init__(in_features, out_features, bias, device)
        self.register_module("quantized", None)
        self.register_module("low_rank", None)

    def quantize(self, kind: str) -> None:
        """Makes room for the weight in that kind, in place of the weight."""
        self.quantized = Quantized(kind, self.out_features, self.in_features, self.weight.device)
        self.weight = None

    def forward(self, x: Tensor, share_BK: Tensor | None = None) -> Tensor:
        """share_BK: how much of each adapter counts in each row; None is nothing of any."""
        bias = None if self.bias is None else stored(self.bias, x)
        out = self.multiply(x, stored(self.weight, x), bias) if self.quantized is None else self.quantized(x, bias)
        return out if share_BK is None or self.low_rank is None else out + self.low_rank(x, share_BK)

    def widen(self) -> None:
        """Keeps the weight and the adapters' up_NR in one piece of memory, of which both are parts from then on."""
        wide = torch.cat((self.weight, self.low_rank.up_NR), dim=1)
        self.weight.data, self.low_rank.up_NR = wide.split((self.in_features, wide.shape[1] - self.in_features), dim=1)
        self.low_rank.wide = wide


class Embedding(nn.Embedding):
    """A table, whose rows may be quantised, see `quantize`."""

    quantized: Quantized | None

    def __init__(self, rows: int, channels: int):
        super().__init__(rows, channels)
        self.register_module("quantized", None)

    def reset_parameters(self) -> None:
        """One without memory has nothing to initialise; torch would import its compiler for that, two seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def quantize(self, kind: str) -> None:
        """Makes room for the table in that kind, in its place."""
        self.quantized = Quantized(kind, self.num_embeddings, self.embedding_dim, self.weight.device)
        self.weight = None

    def forward(self, ids: Tensor) -> Tensor:
        """[*ids, C], in float32 if it is quantised."""
        if self.quantized is None:
            return super().forward(ids)
        rows = self.quantized.rows(lambda table: table.index_select(0, ids.flatten()))
        return rows.view(*ids.shape, self.embedding_dim)

    def row(self, number: int) -> Tensor:
        """[C], as `forward`, and without a copy from the host for the number."""
        return self.weight[number] if self.quantized is None else self.quantized.rows(lambda table: table[number])
