"""GPU kernels of products in 8 bits (model/quantized.py says what they compute), in Triton (https://triton-lang.org) and by
torch's own for 8-bit floats.

M tokens, C channels in, N channels out.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bagel_opt.model.quantized import LEAST, quantized_product
from bagel_opt.runtime import few_tokens, one_token
from bagel_opt.runtime.few_tokens import FEW

# Blocks of a product with one token: those that read fastest, of some tried on an H200.
SHORT, LONG = ({"BLOCK_N": n, "BLOCK_C": c, "num_warps": w} for n, c, w in ((4, 512, 2), (4, 1024, 4)))
LONG_CHANNELS = 8192
RECIPROCAL = tl.constexpr(1 / 448)  # of the largest 8-bit float; to_codes multiplies with it, too


@quantized_product.register_kernel("cuda")
def _(
    x_MC: Tensor,
    x_scale_M: Tensor | None,
    codes_NC: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: str,
) -> Tensor:
    (m, c), n, dtype = x_MC.shape, codes_NC.shape[0], getattr(torch, dtype)
    floats, coded = codes_NC.dtype == torch.float8_e4m3fn, x_scale_M is not None
    if m > FEW and dtype == torch.bfloat16 and floats and coded and c % 16 == n % 16 == 0:
        scales = x_scale_M[:, None], scale_N[None]
        return torch._scaled_mm(x_MC, codes_NC.T, *scales, bias=bias_N, out_dtype=dtype, use_fast_accum=True)
    if m > 1 and not coded and few_tokens.fits(x_MC, codes_NC):
        return few_tokens.product(x_MC, codes_NC, scale_N, bias_N)
    x_MC, out_MN = x_MC.contiguous(), x_MC.new_empty((m, n), dtype=dtype)
    if m == 1 and not coded:
        one_token.multiply(x_MC, codes_NC, scale_N, bias_N, out_MN, **(LONG if c > LONG_CHANNELS else SHORT))
        return out_MN
    if m <= FEW:
        sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": 256, "num_warps": 2 if coded else 4, "num_stages": 5}
    else:
        sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}
    grid = (triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"]),)
    bias = scale_N if bias_N is None else bias_N
    given = x_MC, x_scale_M if coded else scale_N, codes_NC, scale_N, bias, out_MN
    about = {"BIAS": bias_N is not None, "CODED": coded, "WHOLE": coded and not floats}
    _product_kernel[grid](*given, m, n, c, **about, **sizes)
    return out_MN


@triton.jit
def _product_kernel(
    x, x_scale, codes, scale, bias, out, m, n, c,
    BIAS: tl.constexpr, CODED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of the product; those of eight rows of blocks go together, which share what they read."""
    across, down = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    group = tl.program_id(0) // (8 * across)
    high = tl.minimum(down - group * 8, 8)
    within = tl.program_id(0) % (8 * across)
    rows = (group * 8 + within % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // high) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_C)
    sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if WHOLE else tl.float32)
    for start in range(0, c, BLOCK_C):
        inside = start + channels < c
        at = rows[:, None].to(tl.int64) * c + start + channels[None]
        a = tl.load(x + at, mask=(rows[:, None] < m) & inside[None], other=0.0)
        at = columns[None].to(tl.int64) * c + start + channels[:, None]
        b = tl.load(codes + at, mask=(columns[None] < n) & inside[:, None], other=0.0)
        b = b if CODED else b.to(a.dtype)
        sum = tl.dot(a, b, sum, out_dtype=tl.int32 if WHOLE else tl.float32, input_precision="ieee")
    y = sum.to(tl.float32) * tl.load(scale + columns, mask=columns < n, other=0.0)[None]
    if CODED:
        y *= tl.load(x_scale + rows, mask=rows < m, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None]
    at = rows[:, None].to(tl.int64) * n + columns[None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None] < n))


def float_codes(x_MC: Tensor, norm: nn.RMSNorm | None = None) -> tuple[Tensor, Tensor]:
    """quantized.to_codes as 8-bit floats, of x or of the normed x, in one pass."""
    m, c = x_MC.shape
    codes_MC = torch.empty(m, c, dtype=torch.float8_e4m3fn, device=x_MC.device)
    scale_M = torch.empty(m, dtype=torch.float32, device=x_MC.device)
    block = triton.next_power_of_2(c)
    weight, eps = (x_MC, 0.0) if norm is None else (norm.weight, norm.eps)
    warps = 16 if block > 2**13 else 4
    given = x_MC, weight, codes_MC, scale_M, c, eps, LEAST
    _codes_kernel[(m,)](*given, NORM=norm is not None, BLOCK=block, num_warps=warps)
    return codes_MC, scale_M


@triton.jit
def _codes_kernel(x, weight, codes, scale, c, eps, least, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """One token."""
    row, channels = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channels < c
    y = tl.load(x + row * c + channels, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y) / c + eps) * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
        y = y.to(x.dtype.element_ty).to(tl.float32)  # as the norm hands it out
    by = tl.maximum(tl.max(tl.abs(y)) * RECIPROCAL, least)
    tl.store(codes + row * c + channels, (y / by).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, by)
