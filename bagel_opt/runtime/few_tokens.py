"""The product of few tokens with a weight in 8 or 4 bits, in Gluon (https://triton-lang.org): a weight is read once, straight into
the registers from which tensor cores take it, and made floats there.

A tensor core multiplies 16 rows of weights with 8 tokens. Which channels of a row a thread has does not matter, as long as it has the
same ones of the tokens. So each thread reads 16 bytes of a row, a chunk, which in 4 bits is a group and has one scale. A chunk is 8
words of 16 bits, and channel P * h + j of it is in word h: P = 2 in 8 bits, 4 in 4. Channels with the same j are a plane: two words
that are in one register give the two floats that a tensor core takes in one.

M tokens, of which a block has room for T, C channels in, N channels out, B bytes of a row; W warps share out the chunks of R rows, of
which a thread has J at a time.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

FEW = 16  # tokens at most
CHUNK = 16  # bytes


def fits(x_MC: Tensor, codes_NB: Tensor) -> bool:
    """Whether `product` takes them."""
    few, floats = 0 < len(x_MC) <= FEW, x_MC.dtype in (torch.bfloat16, torch.float16)
    return few and floats and codes_NB.shape[1] % CHUNK == 0


def product(x_MC: Tensor, codes_NB: Tensor, scale: Tensor, bias_N: Tensor | None) -> Tensor:
    """x @ weight.T + bias of at most FEW tokens in 16 bits, of a weight that codes and scales stand for as in model/quantized.py: those
    of 4 bits are uint8, and have scales for groups. -> [M, N]"""
    (m, c), (n, bytes), x_MC = x_MC.shape, codes_NB.shape, x_MC.contiguous()
    out_MN, chunks, planes = x_MC.new_empty(m, n), bytes // CHUNK, 4 if codes_NB.dtype == torch.uint8 else 2
    given = x_MC, codes_NB.view(torch.int32), scale, scale if bias_N is None else bias_N, out_MN
    sizes = blocks(m, n, chunks, planes)
    whole = c == chunks * 8 * planes and chunks % (4 * sizes["W"] * sizes["J"]) == 0
    about = {"BIAS": bias_N is not None, "WHOLE": whole, "T": 8 if m <= 8 else 16, "P": planes, **sizes}
    floats = _floats(codes_NB.dtype, x_MC.dtype)
    _kernel[(triton.cdiv(n, sizes["R"]),)](*given, m, n, c, chunks, FLOATS=floats, **about, num_warps=sizes["W"])
    return out_MN


def blocks(m: int, n: int, chunks: int, planes: int) -> dict[str, int]:
    """W, R and J: those that read fastest, of some tried on an H200 for BAGEL's products."""
    wide, deep = n > 2**13, chunks > 2**8
    if planes == 2:
        return {"W": 1 if wide else 8 if deep or m <= 8 else 4, "R": 16, "J": 2}
    if wide:
        return {"W": 2, "R": 16, "J": 2} if m == 1 else {"W": 2, "R": 32, "J": 1}
    return {"W": 8 if deep else 4, "R": 32 if deep and m > 1 else 16, "J": 2}


def _floats(codes: torch.dtype, floats: torch.dtype) -> str:
    """PTX for two words of 16 bits: the floats of each plane. For 4 bits there is the scale besides, twice, by which numbers are
    rounded, once."""
    kind = "bf16x2" if floats == torch.bfloat16 else "f16x2"
    if codes == torch.uint8:
        # a code in the low bits of a float that has nothing but zeros there is added to it: to 128, or to 1024
        code_of_0, one, minus = (
            ("0x43004300", "0x3F803F80", "0xC308C308")
            if floats == torch.bfloat16
            else ("0x64006400", "0x3C003C00", "0xE408E408")
        )
        lines = [".reg .b32 w1, w2, w3, one, minus, nil;", f"mov.b32 one, {one};", f"mov.b32 minus, {minus};"]
        lines += ["mov.b32 nil, 0x80008000;", *(f"shr.u32 w{j}, $4, {4 * j};" for j in (1, 2, 3))]
        for j, word in enumerate(("$4", "w1", "w2", "w3")):
            lines += [
                f"lop3.b32 ${j}, {word}, 0x000F000F, {code_of_0}, 0xEA;",  # (word & mask) | code_of_0
                f"fma.rn.{kind} ${j}, ${j}, one, minus;",
                f"fma.rn.{kind} ${j}, ${j}, $5, nil;",
            ]
        return "\n".join(("{", *lines, "}"))
    lines = [".reg .f32 f<4>;"]
    if codes == torch.int8:
        # the same with 2^23 as a float32, and codes plus 128: few whole numbers are made floats at a time
        lines += [".reg .b32 word, b<4>;", "xor.b32 word, $2, 0x80808080;"]
        for k in range(4):
            lines += [
                f"prmt.b32 b{k}, word, 0x4B000000, 0x744{k};",
                f"mov.b32 f{k}, b{k};",
                f"sub.f32 f{k}, f{k}, 0f4B000080;",
            ]
    else:
        lines += [".reg .b16 h<2>, g<4>;", ".reg .b32 p<2>;", "mov.b32 {h0, h1}, $2;"]
        for k in range(2):
            lines += [f"cvt.rn.f16x2.e4m3x2 p{k}, h{k};", f"mov.b32 {{g{2 * k}, g{2 * k + 1}}}, p{k};"]
        lines += [f"cvt.f32.f16 f{k}, g{k};" for k in range(4)]
    lines += [f"cvt.rn.{kind}.f32 ${j}, f{j + 2}, f{j};" for j in range(2)]
    return "\n".join(("{", *lines, "}"))


@gluon.constexpr_function
def _bits(first, last, axis):
    """The bits of an index along one of four axes."""
    return [[(1 << bit) * (a == axis) for a in range(4)] for bit in range(first, last)]


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _of_weights(W, R, J, many):
    """Where [W, R, 4 * J chunks, many] lie, `many` being parts of a chunk: each thread has chunks of every eighth row."""
    here = _bits(0, _log2(many), 3) + _bits(3, 4, 1) + _bits(2, 2 + _log2(J), 2) + _bits(4, _log2(R), 1)
    there = _bits(0, 2, 2) + _bits(0, 3, 1)
    return gl.DistributedLinearLayout(here, there, _bits(0, _log2(W), 0), [], [W, R, 4 * J, many])


@gluon.constexpr_function
def _of_tokens(W, J, P, T):
    """Where [W, 4 * J chunks, 8 * P channels, T tokens] lie: each thread has chunks of one token, or of two."""
    here = _bits(0, 3 + _log2(P), 2) + _bits(2, 2 + _log2(J), 1) + _bits(3, _log2(T), 3)
    there = _bits(0, 2, 1) + _bits(0, 3, 3)
    return gl.DistributedLinearLayout(here, there, _bits(0, _log2(W), 0), [], [W, 4 * J, 8 * P, T])


@gluon.jit
def _kernel(
    x, words, scale, bias, out, m, n, c, chunks,
    FLOATS: gl.constexpr, BIAS: gl.constexpr, WHOLE: gl.constexpr, P: gl.constexpr, T: gl.constexpr,
    W: gl.constexpr, R: gl.constexpr, J: gl.constexpr,
):  # fmt: skip
    """R channels out. A warp has every W-th of the steps; while it computes one, the next one's weights are on their way.
    WHOLE: whether steps and chunks are whole, so that no channel is past the last."""
    product: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    TOKENS: gl.constexpr = _of_tokens(W, J, P, T)
    CHUNKS: gl.constexpr = gl.SliceLayout(3, _of_weights(W, R, J, 4))
    STEP: gl.constexpr = W * 4 * J
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, CHUNKS)))[:, None, None]
    row = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, CHUNKS)))[None, :, None] + gl.program_id(0) * R
    row = gl.minimum(row, n - 1).to(gl.int64)
    chunk = gl.arange(0, 4 * J, gl.SliceLayout(0, gl.SliceLayout(1, CHUNKS)))[None, None, :] + warp * 4 * J
    OF_X: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, TOKENS))
    warp = gl.arange(0, W, gl.SliceLayout(1, OF_X))[:, None]
    chunk_of_x = gl.arange(0, 4 * J, gl.SliceLayout(0, OF_X))[None, :] + warp * 4 * J
    within = gl.arange(0, 8 * P, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, TOKENS))))[None, None, :, None]
    channel = chunk_of_x[:, :, None, None] * (8 * P) + within
    token = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS))))[None, None, None, :]
    x += gl.minimum(token, m - 1) * c  # what further tokens give is not kept
    sum = gl.zeros((W, R, T), gl.float32, product)
    packed, by = _read(words, scale, row, chunk, chunks, P)
    for start in range(0, chunks, STEP):
        next_packed, next_by = _read(words, scale, row, chunk + start + STEP, chunks, P)
        at = channel + start * (8 * P)
        if WHOLE:  # noqa: SIM108  both are compiled in an expression
            a = gl.load(x + at)
        else:
            a = gl.load(x + at, mask=at < c, other=0.0)
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        HALVES: gl.constexpr = _of_weights(W, R, J, 8)
        halves = gl.convert_layout(gl.join(low, high).reshape((W, R, 4 * J, 8)), HALVES, assert_trivial=True)
        if P == 4:
            scales = gl.convert_layout(by, gl.SliceLayout(3, HALVES), assert_trivial=True).to(x.dtype.element_ty)
            w0, w1, w2, w3 = gl.inline_asm_elementwise(
                FLOATS,
                "=&r,=&r,=&r,=&r,r,r",
                [halves, scales[:, :, :, None]],
                dtype=(x.dtype.element_ty,) * 4,
                is_pure=True,
                pack=2,
            )
            even, odd = gl.split(a.reshape((W, 4 * J, 8, 2, 2, T)).permute((0, 1, 2, 5, 3, 4)))
            a0, a2 = gl.split(even)
            a1, a3 = gl.split(odd)
            sum = _add(w2, a2, _add(w0, a0, sum, W, R, J, T), W, R, J, T)
            sum = _add(w3, a3, _add(w1, a1, sum, W, R, J, T), W, R, J, T)
        else:
            w0, w1 = gl.inline_asm_elementwise(
                FLOATS, "=&r,=&r,r", [halves], dtype=(x.dtype.element_ty,) * 2, is_pure=True, pack=2
            )
            a0, a1 = gl.split(a.reshape((W, 4 * J, 8, 2, T)).permute((0, 1, 2, 4, 3)))
            sum = _add(w1, a1, _add(w0, a0, sum, W, R, J, T), W, R, J, T)
        packed, by = next_packed, next_by
    y = gl.sum(sum, axis=0)
    DONE: gl.constexpr = gl.SliceLayout(0, product)
    row = gl.program_id(0) * R + gl.arange(0, R, gl.SliceLayout(1, DONE))[:, None]
    token = gl.arange(0, T, gl.SliceLayout(0, DONE))[None, :]
    if P == 2:
        y *= gl.load(scale + row, mask=row < n, other=0.0)
    if BIAS:
        y += gl.load(bias + row, mask=row < n, other=0.0).to(gl.float32)
    gl.store(out + token * n + row, y.to(out.dtype.element_ty), mask=(token < m) & (row < n))


@gluon.jit
def _read(words, scale, row, chunk, chunks, P: gl.constexpr):
    """Words [W, R, 4 * J, 4], and in 4 bits the scales of groups; past the last chunk it is the last, which then meets zeros."""
    at = row * chunks + gl.minimum(chunk, chunks - 1)
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, at.type.layout.parent))))
    packed = gl.load(words + at[:, :, :, None] * 4 + word[None, None, None, :])
    if P == 4:
        return packed, gl.load(scale + at)
    else:
        return packed, packed


@gluon.jit
def _add(weight, a, sum, W: gl.constexpr, R: gl.constexpr, J: gl.constexpr, T: gl.constexpr):
    """sum [W, R, T] + weight @ a, of a plane."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, sum.type.layout, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, sum.type.layout, 8)
    weight = gl.convert_layout(weight.reshape((W, R, 32 * J)), LEFT, assert_trivial=True)
    return mma_v2(weight, gl.convert_layout(a.reshape((W, 32 * J, T)), RIGHT, assert_trivial=True), sum)
