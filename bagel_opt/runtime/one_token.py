"""The product with a single token on a GPU, in Triton (https://triton-lang.org): it reads the weight once, and little else
counts. C channels in, N channels out."""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Of twelve tried on an H200 for BAGEL's products the fastest in all: 2.7 to 4.4 TB/s, where cuBLAS reads 2.2 to 4.1.
BLOCK = {"BLOCK_N": 2, "BLOCK_C": 512, "num_warps": 2}


def linear(x: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    """F.linear. x: [..., C]"""
    if x.numel() != x.shape[-1]:
        return F.linear(x, weight_NC, bias_N)
    return product(x.flatten(), weight_NC, bias_N).view(*x.shape[:-1], -1)


@torch.library.custom_op("bagel_opt::one_token_product", mutates_args=())
def product(x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    """weight @ x + bias, added up in float32 and rounded once: [N]"""
    n, c = weight_NC.shape
    out_N = x_C.new_empty(n)
    given = x_C.contiguous(), weight_NC, x_C if bias_N is None else bias_N, out_N
    _kernel[(triton.cdiv(n, BLOCK["BLOCK_N"]),)](*given, n, c, weight_NC.stride(0), BIAS=bias_N is not None, **BLOCK)
    return out_N


@product.register_fake
def _(x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_C.new_empty(weight_NC.shape[0])


@triton.jit
def _kernel(x, weight, bias, out, n, c, row, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some channels out. row: from one of them to the next in the weight, of which adapters may be the rest."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, c, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        at = rows[:, None].to(tl.int64) * row + channels[None]
        w = tl.load(weight + at, mask=(rows[:, None] < n) & (channels[None] < c), other=0.0).to(tl.float32)
        sum += w * tl.load(x + channels, mask=channels < c, other=0.0).to(tl.float32)[None]
    y = tl.sum(sum, axis=1)
    if BIAS:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < n)
