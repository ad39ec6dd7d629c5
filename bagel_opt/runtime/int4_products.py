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
from bagel_opt.runtime import few_tokens

WORDS = tl.constexpr(GROUP // 8)  # of a group
# 2^23 as a float has nothing but zeros behind the point: a code put there is added to it, which takes less than turning it
# from a whole number into a float, of which a multiprocessor does few at a time.
BITS_OF_2_23, CODE_OF_0 = tl.constexpr(0x4B000000), tl.constexpr(2.0**23 + 8)


@int4_product.register_kernel("cuda")
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    if few_tokens.fits(x_MC, codes_NB):
        return few_tokens.product(x_MC, codes_NB, scale_NG, bias_N)
    return F.linear(x_MC, unpacked(codes_NB, scale_NG, x_MC.shape[1], x_MC.dtype), bias_N)


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
