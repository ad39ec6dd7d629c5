"""Products of 8-bit floats with what follows them in one kernel, on Hopper GPUs, by quack-kernels: as fused_products.py has
them in 16 bits.

M rows (all tokens of all rows of a batch), N channels out. Partial sums are kept as the tensor cores keep them, which is
less than float32: the others are five times slower. An error of 0.2 to 0.4% was seen, the rounding to bfloat16 included;
that of the 8-bit numbers themselves is ten times larger.
"""

import torch
from quack.activation import swiglu
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import ColVecLoad, RowVecLoad
from torch import Tensor

from bagel_opt.model.linear import Linear
from bagel_opt.model.quantized import Quantized
from bagel_opt.model.transformer import Expert
from bagel_opt.runtime.quantized_products import float_codes

Codes = tuple[Tensor, Tensor]  # of quantized_products.float_codes
# Tiles of a product, the fastest of those tried on an H100 for 4,096 and 8,192 rows of BAGEL's four products.
TILES = {
    "short": {"tile_M": 128, "tile_N": 160, "cluster_M": 2, "pingpong": True},
    "wide": {"tile_M": 128, "tile_N": 192, "cluster_M": 2, "pingpong": True},
    "long": {"tile_M": 256, "tile_N": 192, "cluster_M": 1, "pingpong": False},
}
LONG_ROWS, LONG_CHANNELS = 8192, 8192
VECTORS = {"by_row": ColVecLoad("by_row"), "by_column": RowVecLoad("by_column")}


@gemm_epilogue(ops=VECTORS)
def _plain(acc, by_row, by_column):  # noqa: ANN001, ANN202  these four are traced
    return {"D": acc * by_row * by_column}


@gemm_epilogue(ops=VECTORS | {"bias": RowVecLoad("bias")})
def _biased(acc, by_row, by_column, bias):  # noqa: ANN001, ANN202
    return {"D": acc * by_row * by_column + bias}


@gemm_epilogue(ops=VECTORS)
def _added(acc, c, by_row, by_column):  # noqa: ANN001, ANN202
    return {"D": acc * by_row * by_column + c}


@gemm_epilogue(outputs=("y",), mode="acc_pair", ops=VECTORS)
def _gated(acc, by_row, by_column):  # noqa: ANN001, ANN202
    gate, up = unpack(acc * by_row * by_column)
    return {"y": swiglu(gate, up)}


def product(x: Codes, linear: Linear, residual_MN: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias or + residual, rounded once. -> [M, N]"""
    (codes_MC, _), weight = x, linear.quantized
    (m, c), n = codes_MC.shape, weight.codes.shape[0]
    out_MN = torch.empty(m, n, dtype=torch.bfloat16, device=codes_MC.device)
    long = c > LONG_CHANNELS
    tile = "long" if long and m >= LONG_ROWS else "wide" if long else "short"
    given, kernel = {}, _plain
    if linear.bias is not None:
        given, kernel = {"bias": linear.bias.float()[None]}, _biased
    elif residual_MN is not None:
        kernel = _added
    _run(kernel, x, weight, out_MN, residual_MN, given, tile)
    return out_MN


def gated_product(x: Codes, linear: Linear) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of x @ weight.T, never rounded nor stored. -> [M, N / 2]"""
    (codes_MC, _), weight = x, linear.quantized
    y = torch.empty(codes_MC.shape[0], weight.codes.shape[0] // 2, dtype=torch.bfloat16, device=codes_MC.device)
    _run(_gated, x, weight, None, None, {"y": y[None]}, "wide", ("B",))
    return y


def _run(
    kernel: EpiMod,
    x: Codes,
    weight: Quantized,
    out_MN: Tensor | None,
    residual_MN: Tensor | None,
    given: dict[str, Tensor],
    tile: str,
    pairs: tuple[str, ...] | None = None,
) -> None:
    """pairs: operands that hold all gates before all ups; the kernel wants each beside its own."""
    (codes_MC, scale_M), by_column = x, weight.scale
    if pairs:
        by_column = torch.stack(by_column.chunk(2), dim=1).flatten()
    kernel.gemm(
        codes_MC[None],
        weight.codes[None],
        None if out_MN is None else out_MN[None],
        None if residual_MN is None else residual_MN[None],
        epi_args={"by_row": scale_M[None], "by_column": by_column[None], **given},
        concat_layout=pairs,
        cluster_N=1,
        post_init_attrs=(("fp8_slow_accum", False),),
        **TILES[tile],
    )


def entered(expert: Expert, x: Tensor) -> Tensor:
    """An expert's product before the attention, of its tokens [B, T, C], norm included: [B, T, N]."""
    return product(float_codes(x.flatten(0, 1), expert.norm1), expert.qkv).view(*x.shape[:2], -1)


def left(expert: Expert, x: Tensor, attended: Tensor) -> Tensor:
    """`Expert.finish`: tokens [B, T, C] after the attention [B, T, H, D] and the MLP."""
    rows = product(float_codes(attended.flatten(2).flatten(0, 1)), expert.o, x.flatten(0, 1))
    hidden = gated_product(float_codes(rows, expert.norm2), expert.gate_up)
    return product(float_codes(hidden), expert.down, rows).view(x.shape)


def try_products(device: torch.device) -> None:
    """Raises what these kernels raise here."""
    for bias, channels in ((True, 256), (False, 256), (False, 2 * LONG_CHANNELS)):
        linear = Linear(channels, 512, bias=bias, device=str(device)).to(torch.bfloat16)
        linear.quantize("fp8")
        linear.quantized.store(torch.randn(512, channels))
        x = torch.ones(128, channels, device=device).to(torch.float8_e4m3fn), torch.ones(128, device=device)
        product(x, linear)
        if not bias:
            product(x, linear, torch.ones(128, 512, dtype=torch.bfloat16, device=device))
        gated_product(x, linear)
    torch.cuda.synchronize(device)
