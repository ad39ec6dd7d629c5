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

# Blocks of a product with one token, and with several: those that read fastest, of some tried on an H200.
ONE = {"BLOCK_G": 128, "num_warps": 4}
SEVERAL = {"BLOCK_N": 16, "BLOCK_W": 32, "num_warps": 1}
FEW = 16  # tokens up to which a product of several takes a weight packed
WIDE = 2**13  # channels out from which on it does; smaller weights take less unpacked, since they fit a cache
WORDS = tl.constexpr(GROUP // 8)  # of a group
# 2^23 as a float has nothing but zeros behind the point: a code put there is added to it, which takes less than turning it
# from a whole number into a float, of which a multiprocessor does few at a time.
BITS_OF_2_23, CODE_OF_0 = tl.constexpr(0x4B000000), tl.constexpr(2.0**23 + 8)


@int4_product.register_kernel("cuda")
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    (m, c), (n, groups) = x_MC.shape, scale_NG.shape
    if m > FEW or (m > 1 and n < WIDE):
        return F.linear(x_MC, unpacked(codes_NB, scale_NG, c, x_MC.dtype), bias_N)
    out_MN, words = x_MC.new_empty(m, n), groups * GROUP // 8
    given = codes_NB.view(torch.int32), scale_NG, scale_NG if bias_N is None else bias_N, out_MN
    if m == 1:
        x_8W = torch.empty(8, words, dtype=torch.float32, device=x_MC.device)
        _planar_kernel[(triton.cdiv(words, 128),)](x_MC.contiguous(), x_8W, c, words, BLOCK=128)
        _one_kernel[(triton.cdiv(n, 4),)](x_8W, *given, n, groups, BIAS=bias_N is not None, **ONE)
        return out_MN
    x_8MW = F.pad(x_MC, (0, groups * GROUP - c)).view(m, words, 8).permute(2, 0, 1).contiguous()
    grid = (triton.cdiv(n, SEVERAL["BLOCK_N"]),)
    _few_kernel[grid](x_8MW, *given, m, n, words, BIAS=bias_N is not None, **SEVERAL)
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
def _planar_kernel(x, out, c, count, BLOCK: tl.constexpr):
    """Some words' channels, channel k of each in the plane k of `out`, [8, count], in float32 and by the factor that `_times`
    wants."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(8):
        a = tl.load(x + word * 8 + k, mask=word * 8 + k < c, other=0.0).to(tl.float32)
        tl.store(out + k * count + word, a * 16.0 ** -(k % 5), mask=word < count)


@triton.jit
def _one_kernel(x, words, scale, bias, out, n, groups, BIAS: tl.constexpr, BLOCK_G: tl.constexpr):
    """One token and four channels out; x as _planar_kernel has it. A thread has a group of each, so that its words are one
    read, and x is where its words are: tensors of one shape, [G, WORDS], stay in the threads that read them."""
    first = tl.program_id(0) * 4
    sum0 = tl.zeros((BLOCK_G,), dtype=tl.float32)
    sum1 = tl.zeros((BLOCK_G,), dtype=tl.float32)
    sum2 = tl.zeros((BLOCK_G,), dtype=tl.float32)
    sum3 = tl.zeros((BLOCK_G,), dtype=tl.float32)
    count = groups * WORDS
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        word, inside = group[:, None] * WORDS + tl.arange(0, WORDS)[None], group < groups
        packed0, by0 = _row(words, scale, first, word, group, groups)
        packed1, by1 = _row(words, scale, tl.minimum(first + 1, n - 1), word, group, groups)
        packed2, by2 = _row(words, scale, tl.minimum(first + 2, n - 1), word, group, groups)
        packed3, by3 = _row(words, scale, tl.minimum(first + 3, n - 1), word, group, groups)
        a0 = tl.load(x + word, mask=inside[:, None], other=0.0)
        a1 = tl.load(x + count + word, mask=inside[:, None], other=0.0)
        a2 = tl.load(x + 2 * count + word, mask=inside[:, None], other=0.0)
        a3 = tl.load(x + 3 * count + word, mask=inside[:, None], other=0.0)
        a4 = tl.load(x + 4 * count + word, mask=inside[:, None], other=0.0)
        a5 = tl.load(x + 5 * count + word, mask=inside[:, None], other=0.0)
        a6 = tl.load(x + 6 * count + word, mask=inside[:, None], other=0.0)
        a7 = tl.load(x + 7 * count + word, mask=inside[:, None], other=0.0)
        sum0 += _times(packed0, a0, a1, a2, a3, a4, a5, a6, a7) * by0
        sum1 += _times(packed1, a0, a1, a2, a3, a4, a5, a6, a7) * by1
        sum2 += _times(packed2, a0, a1, a2, a3, a4, a5, a6, a7) * by2
        sum3 += _times(packed3, a0, a1, a2, a3, a4, a5, a6, a7) * by3
    i = tl.arange(0, 4)
    low = tl.where(i == 0, tl.sum(sum0, axis=0), tl.sum(sum1, axis=0))
    y = tl.where(i < 2, low, tl.where(i == 2, tl.sum(sum2, axis=0), tl.sum(sum3, axis=0)))
    if BIAS:
        y += tl.load(bias + first + i, mask=first + i < n, other=0.0).to(tl.float32)
    tl.store(out + first + i, y.to(out.dtype.element_ty), mask=first + i < n)


@triton.jit
def _row(words, scale, row, word, group, groups):
    """Words and scales of a row."""
    row = row.to(tl.int64) * groups
    packed = tl.load(words + row * WORDS + word, mask=(group < groups)[:, None], other=0)
    return packed, tl.load(scale + row + group, mask=group < groups, other=0.0).to(tl.float32)


@triton.jit
def _times(packed, a0, a1, a2, a3, a4, a5, a6, a7):
    """Each group's sum of its codes' numbers times x: [G]. A code stays at its place in the word, where it counts 16^k times
    as much, which x makes up for; five of them have room in a float."""
    high = packed >> 20
    sum = _at(packed, 0) * a0 + _at(packed, 1) * a1 + _at(packed, 2) * a2 + _at(packed, 3) * a3 + _at(packed, 4) * a4
    return tl.sum(sum + _at(high, 0) * a5 + _at(high, 1) * a6 + _at(high, 2) * a7, axis=1)


@triton.jit
def _at(words, K: tl.constexpr):
    """The number of the code K of each word, times 16^K."""
    mask, bits = tl.full((1,), 15 << (4 * K), tl.int32), tl.full((1,), BITS_OF_2_23, tl.int32)
    # (words & mask) | bits, for which the compiler would take two instructions
    found = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, mask, bits], dtype=tl.int32, is_pure=True, pack=1
    )
    return found.to(tl.float32, bitcast=True) - (2.0**23 + 8 * 16.0**K)


@triton.jit
def _few_kernel(
    x, words, scale, bias, out, m, n, count, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):
    """All tokens, at most 16, and some channels out. x: [8, M, count], channel k of each word in the plane k."""
    rows, columns = tl.arange(0, 16), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_N, 16), dtype=tl.float32)
    for start in range(0, count, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        inside, mine = (word[None] < count) & (columns[:, None] < n), (rows[None] < m) & (word[:, None] < count)
        at = columns[:, None].to(tl.int64) * count + word[None]
        packed = tl.load(words + at, mask=inside, other=0)
        by = tl.load(scale + at // WORDS, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(8):
            a = tl.load(x + (k * m + rows[None]) * count + word[:, None], mask=mine, other=0.0)
            sum = tl.dot((_float(packed, k) * by).to(a.dtype), a, sum, input_precision="ieee")
    if BIAS:
        sum += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    at = rows[None] * n + columns[:, None]
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=(rows[None] < m) & (columns[:, None] < n))
