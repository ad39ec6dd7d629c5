"""The product with a single token on a GPU, in Triton (https://triton-lang.org): it reads the weight once, and little else
counts. The weight may be quantised in 8 bits. C channels in, N channels out."""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bagel_opt.model.linear import Span
from bagel_opt.model.linear import product as plain

# Of twelve tried on an H200 for BAGEL's products the fastest in all: 2.7 to 4.4 TB/s, where cuBLAS reads 2.2 to 4.1.
BLOCK = {"BLOCK_N": 2, "BLOCK_C": 512, "num_warps": 2}


def linear(x: Tensor, weight_NC: Tensor, bias_N: Tensor | None, spans: Sequence[Span] = ()) -> Tensor:
    """model.linear.product; two spans in one launch. x: [..., C]"""
    if x.numel() != x.shape[-1] or len(spans) not in (0, 2):
        return plain(x, weight_NC, bias_N, spans)
    given = x.flatten(), weight_NC, bias_N
    found = product_of_two(*given, *spans[0], *spans[1]) if spans else product(*given)
    return found.view(*x.shape[:-1], -1)


@torch.library.custom_op("bagel_opt::one_token_product", mutates_args=())
def product(x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    """weight @ x + bias, added up in float32 and rounded once: [N]"""
    out_N = x_C.new_empty(weight_NC.shape[0])
    multiply(x_C.contiguous(), weight_NC, None, bias_N, out_N, **BLOCK)
    return out_N


@torch.library.custom_op("bagel_opt::one_token_product_of_two", mutates_args=())
def product_of_two(
    x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None, start: int, end: int, start_2: int, end_2: int
) -> Tensor:
    """`product` with the weight's rows of two spans, one after the other."""
    out = x_C.new_empty(end - start + end_2 - start_2)
    multiply(x_C.contiguous(), weight_NC, None, bias_N, out, (start, end - start, start_2), **BLOCK)
    return out


@product_of_two.register_fake
def _(x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None, start: int, end: int, start_2: int, end_2: int) -> Tensor:
    return x_C.new_empty(end - start + end_2 - start_2)


@product.register_fake
def _(x_C: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_C.new_empty(weight_NC.shape[0])


def multiply(
    x: Tensor,
    weight_NC: Tensor,
    scale_N: Tensor | None,
    bias_N: Tensor | None,
    out: Tensor,
    spans: tuple[int, int, int] | None = None,
    **block: int,
) -> None:
    """Writes scale * (weight @ x) + bias. spans: of the weight's channels out those from the first number on, so many as the
    second says, then those from the third. block: BLOCK_N and BLOCK_C, the channels of one step, and num_warps."""
    n, c = out.shape[-1], weight_NC.shape[1]
    first, count, second = spans or (0, n, n)
    given = x, weight_NC, x if scale_N is None else scale_N, x if bias_N is None else bias_N, out
    about = {"TWO": spans is not None, "SCALED": scale_N is not None, "BIAS": bias_N is not None}
    grid, where = (triton.cdiv(n, block["BLOCK_N"]),), (weight_NC.stride(0), first, count, second)
    _kernel[grid](*given, n, c, *where, **about, **block)


@triton.jit
def _kernel(
    x, weight, scale, bias, out, n, c, row, first, count, second,
    TWO: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Some channels out. row: from one of them to the next in the weight, of which adapters may be the rest."""
    number = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.where(number < count, first + number, second - count + number) if TWO else number
    sum = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, c, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        at = rows[:, None].to(tl.int64) * row + channels[None]
        w = tl.load(weight + at, mask=(number[:, None] < n) & (channels[None] < c), other=0.0)
        w = _floats_of_bytes(w) if w.dtype == tl.int8 else w.to(tl.float32)
        sum += w * tl.load(x + channels, mask=channels < c, other=0.0).to(tl.float32)[None]
    y = tl.sum(sum, axis=1)
    if SCALED:
        y *= tl.load(scale + rows, mask=number < n, other=0.0)
    if BIAS:
        y += tl.load(bias + rows, mask=number < n, other=0.0).to(tl.float32)
    tl.store(out + number, y.to(out.dtype.element_ty), mask=number < n)


@triton.jit
def _floats_of_bytes(x):
    """Whole numbers of 8 bits as float32, of which a multiprocessor converts few at a time. 2^23 as a float has nothing but zeros
    behind the point: a byte plus 128 put there is added to it."""
    bits = tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 $0, t, 0x4B000000, 0x7440;
        prmt.b32 $1, t, 0x4B000000, 0x7441;
        prmt.b32 $2, t, 0x4B000000, 0x7442;
        prmt.b32 $3, t, 0x4B000000, 0x7443;
        }""",
        "=r,=r,=r,=r,r",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
    return bits.to(tl.float32, bitcast=True) - (2.0**23 + 128)
