"""TaylorSeer's arithmetic (arXiv 2503.06923). `flow.TaylorSeer` says when each is due.

Each layer's prediction ignores its input, so only the last layer's output is kept.
F stored orders, B rows, N latent tokens, C hidden channels.
"""

import torch
from torch import Tensor, nn

from bagel_opt.model.bagel import Bagel
from bagel_opt.sampling.flow import MAX_ORDER


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

    def __init__(self, model: Bagel):
        super().__init__()
        self.model = model

    def forward(self, distance_B: Tensor, velocity_BNL: Tensor, factors_FBNC: Tensor) -> tuple:
        """distance: evaluations since the last full one, 0 for a row that keeps its velocity. -> velocity_BNL"""
        hidden, weight_B = factors_FBNC[0], torch.ones_like(distance_B)
        for order in range(1, MAX_ORDER + 1):
            weight_B = weight_B * distance_B / order
            hidden = hidden + weight_B[:, None, None].to(hidden.dtype) * factors_FBNC[order]
        return (torch.where((distance_B > 0)[:, None, None], self.model.velocity(hidden), velocity_BNL),)
