"""Matrix products with what follows them in one kernel, on Hopper GPUs: by quack-kernels, which flash-attn-4 brings.

M rows (all tokens of all rows of a batch), K channels in, N channels out.
"""

import functools
import logging
import math
from collections.abc import Callable, Set

import torch
from torch import Tensor

from bagel_opt import installed
from bagel_opt.errors import reason

QUACK = "quack-kernels"
log = logging.getLogger("bagel_opt")

# Tiles of a product. Two of the narrow ones take turns on a multiprocessor, so one's epilogue hides behind the other. On an
# H100 both reach some 700 TFLOP/s where they fill it; still narrower ones, of 128x128, 450.
WIDE = {"tile_m": 128, "tile_n": 256, "pingpong": False}
NARROW = {"tile_m": 128, "tile_n": 192, "pingpong": True}
OTHERS = "they are for Hopper GPUs, in bfloat16 and float16"
LEAST_ROWS = 512  # of a product: below, the weights' way from memory decides


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias + residual, rounded once. -> [M, N]"""
    return _call(x_MK, weight_NK, _tile(x_MK, weight_NK), C=residual_MN, bias=bias_N)


def gated_product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of x @ weight.T, never rounded nor stored. -> [M, N / 2]"""
    return _call(x_MK, weight_NK, NARROW, activation="swiglu", concat_layout=("B",))


def _tile(x_MK: Tensor, weight_NK: Tensor) -> dict:
    """Those tiles of which the last ones leave the fewest multiprocessors idle."""
    count = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    return max((NARROW, WIDE), key=lambda tile: _fill(x_MK.shape[0], weight_NK.shape[0], tile, count))


def _fill(m: int, n: int, tile: dict, count: int) -> float:
    """The share of all that `count` multiprocessors compute, each a tile at a time, that is wanted."""
    tiles = math.ceil(m / tile["tile_m"]) * math.ceil(n / tile["tile_n"])
    return m * n / (math.ceil(tiles / count) * count * tile["tile_m"] * tile["tile_n"])


def _call(x_MK: Tensor, weight_NK: Tensor, tile: dict, **given: object) -> Tensor:
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act

    config = GemmConfig(**tile, cluster_m=2, cluster_n=1, device_capacity=9, is_dynamic_persistent=False)
    return gemm_act(x_MK, weight_NK.T, store_preact=False, tuned=False, config=config, **given)[1]


def kernels(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """A call of each kernel that a layer may want."""
    installed.kernel_folder("quack")
    calls = []
    for tile, size in ((NARROW, 128), (WIDE, 256)):  # of the same sizes, the second would be taken for the first
        x, weight = (torch.ones(n, size, device=device, dtype=dtype) for n in (size, 2 * size))
        if tile is NARROW:
            calls.append(functools.partial(gated_product, x, weight))
        calls.append(functools.partial(_call, x, weight, tile, bias=weight[:, 0].contiguous(), C=None))
        calls.append(functools.partial(_call, x, weight[:size], tile, bias=None, C=x))
    return calls


def possible(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels are installed, and there are such for this GPU."""
    return _are_for(device, dtype) and installed.is_there("quack")


def _are_for(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not run here, which is tried; None where they do."""
    if not _are_for(device, dtype):
        return OTHERS
    installed.kernel_folder("quack")
    if why := installed.fault("quack"):
        return why
    try:
        for call in kernels(device, dtype):
            call()
        torch.cuda.synchronize(device)
    except Exception as error:
        return f"{type(error).__name__}: {reason(error)}"
    return None


@functools.cache
def fault_fp8(device: torch.device) -> str | None:
    """The same of those of 8-bit floats (runtime/fused_fp8.py)."""
    if why := fault(device, torch.bfloat16):
        return why
    try:
        from bagel_opt.runtime import fused_fp8

        fused_fp8.try_products(device)
    except Exception as error:  # an older quack-kernels lacks what that imports
        return f"{type(error).__name__}: {reason(error)}"
    return None


@functools.cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels are installed and run here. Warns where they are installed and do not."""
    why = fault(device, dtype)
    if why not in (None, OTHERS, installed.ABSENT):
        _warn("", why)
    return why is None


@functools.cache
def usable_fp8(device: torch.device) -> bool:
    """The same of those of 8-bit floats, where the others are usable."""
    why = fault_fp8(device)
    if why:
        _warn(" with 8-bit floats", why)
    return why is None


def described(device: torch.device, dtype: torch.dtype, kinds: Set[str | None]) -> str:
    """What computes them here, or "none". kinds: in which the layers' weights are (quantization.KINDS); None is dtype."""
    if fault(device, dtype):
        return "none"
    fp8 = "fp8" in kinds and dtype == torch.bfloat16 and not fault_fp8(device)
    others = sorted(kinds - {None, "int4", *(["fp8"] if fp8 else [])})
    if len(others) == len(kinds):
        return "none"
    return installed.titled(QUACK) + (f" (not in {', '.join(others)})" if others else "")


def _warn(where: str, why: str) -> None:
    log.warning(
        "%s is installed but fails here%s (%s), so layers run without it, more slowly; %s",
        *(installed.titled(QUACK), where, why, installed.mend_flash()),
    )
