"""Group norm with SiLU of a picture on a GPU, channels last, in Triton (https://triton-lang.org): torch's own for that order
takes three times as long, and what torch.compile makes of it is compiled for each number of channels.

P pixels, C channels, K blocks of pixels. 32 groups, as in the FLUX autoencoder.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

GROUPS = tl.constexpr(32)
NUMBERS = 2**13  # of a block


def norm_silu(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)) in the order of x, [1, C, height, width], rounded once."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    fits = x.shape[0] == 1 and x.is_contiguous(memory_format=torch.channels_last)
    if not fits or channels % 32 or channels > NUMBERS or channels & (channels - 1):
        return F.silu(F.group_norm(x, 32, weight_C, bias_C, eps))
    block = NUMBERS // channels
    blocks = triton.cdiv(pixels, block)
    mean_GK, spread_GK = torch.empty(2, 32, blocks, dtype=torch.float32, device=x.device)
    factor_C, shift_C = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    about = {"C": channels, "BLOCK": block}
    _block_kernel[(blocks,)](x, mean_GK, spread_GK, pixels, blocks, **about)
    given = mean_GK, spread_GK, weight_C, bias_C, factor_C, shift_C
    _group_kernel[(32,)](*given, pixels, blocks, eps, **about, MANY=1024)
    _apply_kernel[(blocks,)](x, factor_C, shift_C, out, pixels, **about)
    return out


@triton.jit
def _block_kernel(x, mean, spread, pixels, blocks, C: tl.constexpr, BLOCK: tl.constexpr):
    """Each group's mean in a block of pixels, and the sum of squares of what differs from it."""
    k = tl.program_id(0)
    pixel = k * BLOCK + tl.arange(0, BLOCK)
    at = pixel[:, None].to(tl.int64) * C + tl.arange(0, C)[None]
    y = tl.load(x + at, mask=pixel[:, None] < pixels, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - k * BLOCK, BLOCK) * (C // GROUPS)
    m_C = tl.sum(y, axis=0)
    m_G = tl.sum(tl.reshape(m_C, (GROUPS, C // GROUPS)), axis=1) / count
    m_C = tl.reshape(tl.broadcast_to(m_G[:, None], (GROUPS, C // GROUPS)), (C,))
    d = tl.where(pixel[:, None] < pixels, y - m_C[None], 0.0)
    s_G = tl.sum(tl.reshape(tl.sum(d * d, axis=0), (GROUPS, C // GROUPS)), axis=1)
    group = tl.arange(0, GROUPS)
    tl.store(mean + group * blocks + k, m_G)
    tl.store(spread + group * blocks + k, s_G)


@triton.jit
def _group_kernel(
    mean, spread, weight, bias, factor, shift, pixels, blocks, eps, C: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    """One group: the means and spreads of its blocks together (Chan, Golub and LeVeque 1983), as what each channel is
    multiplied with and what is added."""
    g, each = tl.program_id(0), C // GROUPS
    sum = tl.zeros((MANY,), dtype=tl.float32)
    for start in range(0, blocks, MANY):
        k = start + tl.arange(0, MANY)
        count = tl.minimum(pixels - k * BLOCK, BLOCK) * each
        sum += tl.load(mean + g * blocks + k, mask=k < blocks, other=0.0) * tl.where(k < blocks, count, 0)
    middle = tl.sum(sum) / pixels / each
    sum = tl.zeros((MANY,), dtype=tl.float32)
    for start in range(0, blocks, MANY):
        k = start + tl.arange(0, MANY)
        count = tl.minimum(pixels - k * BLOCK, BLOCK) * each
        off = tl.load(mean + g * blocks + k, mask=k < blocks, other=0.0) - middle
        inside = tl.load(spread + g * blocks + k, mask=k < blocks, other=0.0) + off * off * count
        sum += tl.where(k < blocks, inside, 0.0)
    by = tl.rsqrt(tl.sum(sum) / pixels / each + eps)
    c = g * each + tl.arange(0, C // GROUPS)
    w = tl.load(weight + c).to(tl.float32) * by
    tl.store(factor + c, w)
    tl.store(shift + c, tl.load(bias + c).to(tl.float32) - middle * w)


@triton.jit
def _apply_kernel(x, factor, shift, out, pixels, C: tl.constexpr, BLOCK: tl.constexpr):
    pixel, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C)
    at = pixel[:, None].to(tl.int64) * C + channel[None]
    y = tl.load(x + at, mask=pixel[:, None] < pixels, other=0.0).to(tl.float32)
    y = y * tl.load(factor + channel)[None] + tl.load(shift + channel)[None]
    y = y / (1 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=pixel[:, None] < pixels)
