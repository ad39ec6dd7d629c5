"""GPU kernels of products with weights in 4 bits (model/quantized.py says what they compute), in Triton.

M tokens, C channels in, N channels out, G groups, B bytes of a row, W words of a row: 8 codes each, 4 of them a group.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bagel_opt.model.quantized import GROUP, int4_product

FEW = 16  # tokens of a product that reads its weights for so few that nothing else counts
WORDS = tl.constexpr(GROUP // 8)  # of a group
# 2^23 as a float has nothing but zeros behind the point: a code put there is added to it, which takes less than turning it
# from a whole number into a float, of which a multiprocessor does few at a time.
BITS_OF_2_23, CODE_OF_0 = tl.constexpr(0x4B000000), tl.constexpr(2.0**23 + 8)


@int4_product.register_kernel("cuda")
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    (m, c), n = x_MC.shape, codes_NB.shape[0]
    if m > FEW:
        return F.linear(x_MC, unpacked(codes_NB, scale_NG, c, x_MC.dtype), bias_N)
    x_MC, words_NW, out_MN = x_MC.contiguous(), codes_NB.view(torch.int32), x_MC.new_empty(m, n)
    kernel, few = (_one_kernel, {"BLOCK_N": 4, "BLOCK_W": 128, "num_warps": 2}) if m == 1 else (_few_kernel, {})
    few = few or {"BLOCK_N": 32, "BLOCK_W": 32, "num_warps": 4, "num_stages": 3}
    given = x_MC, words_NW, scale_NG, scale_NG if bias_N is None else bias_N, out_MN
    kernel[(triton.cdiv(n, few["BLOCK_N"]),)](*given, m, n, c, words_NW.shape[1], BIAS=bias_N is not None, **few)
    return out_MN


def unpacked(codes_NB: Tensor, scale_NG: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """quantized.from_groups in one pass: [N, channels]."""
    n, bytes = codes_NB.shape
    weight_NC = torch.empty(n, 2 * bytes, dtype=dtype, device=codes_NB.device)
    count = n * bytes // 4
    _unpacking_kernel[(triton.cdiv(count, 1024),)](codes_NB.view(torch.int32), scale_NG, weight_NC, count, BLOCK=1024)
    return weight_NC[:, :channels]


@triton.jit
def _floats(words):
    """The 8 numbers of each word, in a last dimension more."""
    shifts = tl.arange(0, 8) * 4
    codes = (tl.expand_dims(words, -1) >> shifts) & 15  # shifts join from the right, as in NumPy
    return (codes | BITS_OF_2_23).to(tl.float32, bitcast=True) - CODE_OF_0


@triton.jit
def _unpacking_kernel(words, scale, out, count, BLOCK: tl.constexpr):
    """Some words of all rows: rows are whole groups."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    numbers = _floats(tl.load(words + at, mask=inside, other=0))
    by = tl.load(scale + at // WORDS, mask=inside, other=0.0).to(tl.float32)
    to = out + at[:, None] * 8 + tl.arange(0, 8)[None]
    tl.store(to, (numbers * by[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _one_kernel(
    x, words, scale, bias, out, m, n, c, w, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):
    """One token and some channels out."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, w, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        inside = (rows[:, None] < n) & (at[None] < w)
        numbers = _floats(tl.load(words + rows[:, None].to(tl.int64) * w + at[None], mask=inside, other=0))
        channels = at[:, None] * 8 + tl.arange(0, 8)[None]
        a = tl.load(x + channels, mask=channels < c, other=0.0).to(tl.float32)
        by = tl.load(scale + rows[:, None] * (w // WORDS) + at[None] // WORDS, mask=inside, other=0.0).to(tl.float32)
        sum += tl.sum(numbers * a[None], axis=2) * by
    y = tl.sum(sum, axis=1)
    if BIAS:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def _few_kernel(
    x, words, scale, bias, out, m, n, c, w, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):
    """All tokens, at most 16, and some channels out."""
    rows, columns = tl.arange(0, 16), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    for start in range(0, w, BLOCK_W):
        at = start + tl.arange(0, BLOCK_W)
        inside = (columns[:, None] < n) & (at[None] < w)
        numbers = _floats(tl.load(words + columns[:, None].to(tl.int64) * w + at[None], mask=inside, other=0))
        by = tl.load(scale + columns[:, None] * (w // WORDS) + at[None] // WORDS, mask=inside, other=0.0).to(tl.float32)
        channels = start * 8 + tl.arange(0, BLOCK_W * 8)
        a = tl.load(x + rows[:, None] * c + channels[None], mask=(rows[:, None] < m) & (channels[None] < c), other=0.0)
        b = tl.reshape(numbers * tl.expand_dims(by, -1), (BLOCK_N, BLOCK_W * 8)).to(a.dtype)
        sum = tl.dot(a, tl.trans(b), sum, input_precision="ieee")
    if BIAS:
        sum += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    at = rows[:, None] * n + columns[None]
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None] < n))
