"""GPU kernels of products with weights in 4 bits (model/quantized.py says what they compute), in Triton.

M tokens, C channels in, N channels out, G groups, B bytes of a row; 4 of them are a word, of 8 codes, and 4 words a group.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bagel_opt.model.quantized import GROUP, int4_product

# Blocks of a product with one token, and with several.
ONE = {"BLOCK_N": 4, "BLOCK_G": 32, "num_warps": 2}
SEVERAL = {"BLOCK_N": 32, "BLOCK_G": 32, "num_warps": 4}
FEW = 16  # tokens of a product that reads its weights for so few that nothing else counts
WORDS = tl.constexpr(GROUP // 8)  # of a group
# 2^23 as a float has nothing but zeros behind the point: a code put there is added to it, which takes less than turning it
# from a whole number into a float, of which a multiprocessor does few at a time.
BITS_OF_2_23, CODE_OF_0 = tl.constexpr(0x4B000000), tl.constexpr(2.0**23 + 8)


@int4_product.register_kernel("cuda")
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    (m, c), (n, groups) = x_MC.shape, scale_NG.shape
    if m > FEW:
        return F.linear(x_MC, unpacked(codes_NB, scale_NG, c, x_MC.dtype), bias_N)
    x_M8G = F.pad(x_MC, (0, groups * GROUP - c)).view(m, groups, GROUP).transpose(1, 2).contiguous()
    out_MN = x_MC.new_empty(m, n)
    kernel, sizes = (_one_kernel, ONE) if m == 1 else (_few_kernel, SEVERAL)
    given = x_M8G, codes_NB.view(torch.int32), scale_NG, scale_NG if bias_N is None else bias_N, out_MN
    kernel[(triton.cdiv(n, sizes["BLOCK_N"]),)](*given, m, n, groups, BIAS=bias_N is not None, **sizes)
    return out_MN


def unpacked(codes_NB: Tensor, scale_NG: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """quantized.from_groups in one pass: [N, channels]."""
    n, bytes = codes_NB.shape
    weight_NC = torch.empty(n, 2 * bytes, dtype=dtype, device=codes_NB.device)
    count = n * bytes // 4
    _unpacking_kernel[(triton.cdiv(count, 1024),)](codes_NB.view(torch.int32), scale_NG, weight_NC, count, BLOCK=1024)
    return weight_NC[:, :channels]


@triton.jit
def _float(words, k):
    """The number of the code k of each word."""
    return (((words >> (4 * k)) & 15) | BITS_OF_2_23).to(tl.float32, bitcast=True) - CODE_OF_0


@triton.jit
def _unpacking_kernel(words, scale, out, count, BLOCK: tl.constexpr):
    """Some words of all rows: rows are whole groups."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    packed = tl.load(words + at, mask=inside, other=0)[:, None]
    by = tl.load(scale + at // WORDS, mask=inside, other=0.0).to(tl.float32)[:, None]
    k = tl.arange(0, 8)[None]
    tl.store(out + at[:, None] * 8 + k, (_float(packed, k) * by).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _one_kernel(
    x, words, scale, bias, out, m, n, groups, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """One token and some channels out; x: [GROUP, groups]. A thread has a group of some channels out."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_N, BLOCK_G), dtype=tl.float32)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        inside = (rows[:, None] < n) & (group[None] < groups)
        at = rows[:, None].to(tl.int64) * groups + group[None]
        part = tl.zeros((BLOCK_N, BLOCK_G), dtype=tl.float32)
        for word in tl.static_range(WORDS):
            packed = tl.load(words + at * WORDS + word, mask=inside, other=0)
            for k in tl.static_range(8):
                a = tl.load(x + (8 * word + k) * groups + group, mask=group < groups, other=0.0).to(tl.float32)
                part += _float(packed, k) * a[None]
        sum += part * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(sum, axis=1)
    if BIAS:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def _few_kernel(
    x, words, scale, bias, out, m, n, groups, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """All tokens, at most 16, and some channels out; x: [M, GROUP, groups]."""
    rows, columns = tl.arange(0, 16), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        inside = (group[:, None] < groups) & (columns[None] < n)
        at = columns[None].to(tl.int64) * groups + group[:, None]
        by = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        mine = (rows[:, None] < m) & (group[None] < groups)
        for word in tl.static_range(WORDS):
            packed = tl.load(words + at * WORDS + word, mask=inside, other=0)
            for k in tl.static_range(8):
                places = (rows[:, None] * (8 * WORDS) + 8 * word + k) * groups + group[None]
                a = tl.load(x + places, mask=mine, other=0.0)
                sum = tl.dot(a, (_float(packed, k) * by).to(a.dtype), sum, input_precision="ieee")
    if BIAS:
        sum += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    at = rows[:, None] * n + columns[None]
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None] < n))
