"""Rotary positions (arXiv 2104.09864), always in float32. B rows, T tokens, A axes, H heads of D channels."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def rope(position: Tensor, head_dim: int, theta: float, sections: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, D / 2] of positions [B, T], or of [B, A, T], of which each axis has its section of the
    D / 2 frequencies (M-RoPE, arXiv 2409.12191)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = position.float()[..., None] * (1.0 / theta**exponent)
    if position.ndim == 3:
        ends = [*accumulate(sections)]  # slices: a split in uneven parts is one that export/onnx_fused.py cannot have
        angle = torch.cat([angle[:, i, :, ends[i] - size : ends[i]] for i, size in enumerate(sections)], dim=-1)
    angle = angle[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs (i, i + D / 2) of each head."""
    a, b = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHD.dtype)
