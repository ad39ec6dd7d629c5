"""The choice of the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChooseToken(nn.Module):
    """Greedy, or sampled at a temperature by inverting the distribution at a uniform number."""

    def forward(self, logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> tuple:
        """temperature: 0 is greedy. uniform: in [0, 1). -> ids_B, -1 where logits are NaN or infinite"""
        greedy = logits_BV.argmax(-1)
        scaled = logits_BV / torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        mass = _summed(scaled.softmax(-1))
        sampled = (mass <= uniform_B[:, None] * mass[:, -1:]).sum(-1).clamp(max=logits_BV.shape[1] - 1)
        chosen = torch.where(temperature_B > 0, sampled, greedy)
        # by a sum, in which no runtime loses a NaN, as some do in a maximum
        return (torch.where(logits_BV.sum(-1).abs() < torch.inf, chosen, -1),)


def _summed(x_BV: Tensor) -> Tensor:
    """Cumulative sums, by blocks of 512: ONNX Runtime's kernel on a GPU adds up everything before each number anew."""
    size = x_BV.shape[1]
    inner = F.pad(x_BV, (0, -size % 512)).unflatten(1, (-1, 512)).cumsum(-1)
    total = inner[..., -1]
    return (inner + (total.cumsum(-1) - total)[..., None]).flatten(1)[:, :size]
