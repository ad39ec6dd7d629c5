"""The choice of the next token."""

import torch
from torch import Tensor, nn


class ChooseToken(nn.Module):
    """Greedy, or sampled at a temperature by inverting the distribution at a uniform number."""

    def forward(self, logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> tuple:
        """temperature: 0 is greedy. uniform: in [0, 1). -> ids_B"""
        greedy = logits_BV.argmax(-1)
        scaled = logits_BV / torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        mass = scaled.softmax(-1).cumsum(-1)
        sampled = (mass <= uniform_B[:, None] * mass[:, -1:]).sum(-1).clamp(max=logits_BV.shape[1] - 1)
        return (torch.where(temperature_B > 0, sampled, greedy),)
