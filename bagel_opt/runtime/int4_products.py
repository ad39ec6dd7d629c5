"""GPU kernels of products with weights in 4 bits (model/quantized.py says what they compute), in Triton.

M tokens, C channels in, N channels out, G groups, B bytes of a row.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from bagel_opt.model.quantized import GROUP, int4_product

FEW = 16  # tokens of a product that reads its weights for so few that nothing else counts
HALF_GROUP = tl.constexpr(GROUP // 2)


@int4_product.register_kernel("cuda")
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    (m, c), n = x_MC.shape, codes_NB.shape[0]
    if m > FEW:
        return F.linear(x_MC, unpacked(codes_NB, scale_NG, c, x_MC.dtype), bias_N)
    x_MC, out_MN = x_MC.contiguous(), x_MC.new_empty(m, n)
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16 if n < 2**13 else 32, "BLOCK_B": 128, "num_warps": 4, "num_stages": 4}
    given = x_MC, codes_NB, scale_NG, scale_NG if bias_N is None else bias_N, out_MN
    _product_kernel[(triton.cdiv(n, sizes["BLOCK_N"]),)](
        *given, m, n, c, codes_NB.shape[1], BIAS=bias_N is not None, **sizes
    )
    return out_MN


def unpacked(codes_NB: Tensor, scale_NG: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """quantized.from_groups in one pass: [N, channels]."""
    n, bytes = codes_NB.shape
    weight_NC = torch.empty(n, 2 * bytes, dtype=dtype, device=codes_NB.device)
    _unpacking_kernel[(triton.cdiv(n * bytes, 4096),)](codes_NB, scale_NG, weight_NC, n * bytes, BLOCK=4096)
    return weight_NC[:, :channels]


@triton.jit
def _unpacking_kernel(codes, scale, out, count, BLOCK: tl.constexpr):
    """Some bytes of all rows: rows are whole groups."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    packed = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    group, k = at // HALF_GROUP, at % HALF_GROUP
    by = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    first = out + group * (2 * HALF_GROUP) + k
    tl.store(first, (((packed & 15) - 8).to(tl.float32) * by).to(out.dtype.element_ty), mask=inside)
    tl.store(first + HALF_GROUP, (((packed >> 4) - 8).to(tl.float32) * by).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product_kernel(
    x, codes, scale, bias, out, m, n, c, bytes,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """All tokens and some channels out."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, bytes, BLOCK_B):
        at = start + tl.arange(0, BLOCK_B)
        inside = (columns[None] < n) & (at[:, None] < bytes)
        packed = tl.load(codes + columns[None].to(tl.int64) * bytes + at[:, None], mask=inside, other=0).to(tl.int32)
        group = at // HALF_GROUP
        by = tl.load(scale + columns[None] * (bytes // HALF_GROUP) + group[:, None], mask=inside, other=0.0).to(
            tl.float32
        )
        channels = group * (2 * HALF_GROUP) + at % HALF_GROUP
        for high in tl.static_range(2):
            mine = channels + high * HALF_GROUP
            mask = (rows[:, None] < m) & (mine[None] < c)
            a = tl.load(x + rows[:, None] * c + mine[None], mask=mask, other=0.0)
            b = (((packed >> (4 * high)) & 15) - 8).to(tl.float32) * by
            sum = tl.dot(a, b.to(a.dtype), sum, input_precision="ieee")
    if BIAS:
        sum += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    at = rows[:, None] * n + columns[None]
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None] < n))
