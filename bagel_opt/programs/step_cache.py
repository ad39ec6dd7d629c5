"""The arithmetic of TaylorSeer (arXiv 2503.06923) and TeaCache (arXiv 2411.19108). sampling/step_caches.py says when each is due.

In TaylorSeer each layer's prediction ignores its input, so only the last layer's output is kept.
F stored orders, B rows, N latent tokens, L latent channels, C hidden channels.
"""

import torch
from torch import Tensor, nn

from bagel_opt.model.mixture import Mixture
from bagel_opt.programs.signatures import MAX_ORDER, REUSE, STORE


class TaylorUpdate(nn.Module):
    """New divided differences from a full evaluation."""

    def forward(self, hidden_BNC: Tensor, differences_B: Tensor, distance_B: Tensor, factors_FBNC: Tensor) -> tuple:
        """differences: how many orders to take, -1 for a row that keeps what it has. -> factors_FBNC"""
        new = [hidden_BNC]
        # at the first evaluation no difference is taken, and the distance is 0
        distance = distance_B.clamp(min=1)[:, None, None].to(hidden_BNC.dtype)
        for order in range(MAX_ORDER):
            difference = (new[order] - factors_FBNC[order]) / distance
            new.append(torch.where((order < differences_B)[:, None, None], difference, 0.0))
        return (torch.where((differences_B >= 0)[:, None, None], torch.stack(new), factors_FBNC),)


class TaylorPredict(nn.Module):
    """The velocities of skipped evaluations, beside those that were evaluated."""

    def __init__(self, model: Mixture):
        super().__init__()
        self.model = model

    def forward(self, distance_B: Tensor, velocity_BNL: Tensor, factors_FBNC: Tensor) -> tuple:
        """distance: evaluations since the last full one, 0 for a row that keeps its velocity. -> velocity_BNL"""
        hidden, weight_B = factors_FBNC[0], torch.ones_like(distance_B)
        for order in range(1, MAX_ORDER + 1):
            weight_B = weight_B * distance_B / order
            hidden = hidden + weight_B[:, None, None].to(hidden.dtype) * factors_FBNC[order]
        return (torch.where((distance_B > 0)[:, None, None], self.model.velocity(hidden), velocity_BNL),)


class TeaChange(nn.Module):
    """How much the transformer's input differs from that of the step before."""

    def __init__(self, model: Mixture):
        super().__init__()
        self.model = model

    def forward(self, x_BNL: Tensor, t: Tensor, index_BN: Tensor, n_B: Tensor, before_BNC: Tensor) -> tuple:
        """n: real tokens. -> change_B, the mean absolute difference over the mean absolute value; embedded_BNC"""
        embedded_BNC = self.model.embed_latents(x_BNL, t, index_BN)
        real_BN1 = (torch.arange(x_BNL.shape[1], device=x_BNL.device) < n_B[:, None])[..., None]

        def size(u_BNC: Tensor) -> Tensor:
            return torch.where(real_BN1, u_BNC.float().abs(), 0.0).sum((1, 2))

        return size(embedded_BNC - before_BNC) / size(before_BNC).clamp(min=1e-8), embedded_BNC


class TeaApply(nn.Module):
    """What evaluations added to their input is stored, and added again to the input of rows that are not evaluated."""

    def __init__(self, model: Mixture):
        super().__init__()
        self.model = model

    def forward(
        self, what_B: Tensor, hidden_BNC: Tensor, embedded_BNC: Tensor, added_BNC: Tensor, velocity_BNL: Tensor
    ) -> tuple:
        """what: STORE, REUSE, or 0 for a row that keeps what it has. hidden: the last layer's output, of rows to store.
        -> added_BNC, velocity_BNL"""
        what_B11 = what_B[:, None, None]
        added_BNC = torch.where(what_B11 == STORE, hidden_BNC - embedded_BNC, added_BNC)
        again = self.model.velocity(embedded_BNC + added_BNC)
        return added_BNC, torch.where(what_B11 == REUSE, again, velocity_BNL)
