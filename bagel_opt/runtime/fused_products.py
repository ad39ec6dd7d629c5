"""Matrix products with what follows them in one kernel, on Hopper GPUs: by quack-kernels, which flash-attn-4 brings.

M rows (all tokens of all rows of a batch), K channels in, N channels out.
"""

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Tiles of a product. Two of the narrow ones take turns on a multiprocessor, so one's epilogue hides behind the other. On an
# H100 both reach some 700 TFLOP/s where they fill it; still narrower ones, of 128x128, 450.
WIDE = {"tile_m": 128, "tile_n": 256, "pingpong": False}
NARROW = {"tile_m": 128, "tile_n": 192, "pingpong": True}
KEPT = "quack"  # a folder in torch's cache
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


def cache_folder() -> Path:
    """Where quack-kernels keeps what it has compiled: beside torch, unless its own variable says otherwise."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(os.environ.setdefault("QUACK_CACHE_DIR", str(Path(cache_dir()) / KEPT)))


def kernels(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """A call of each kernel that a layer may want."""
    cache_folder()
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
    half = dtype in (torch.float16, torch.bfloat16)
    return half and torch.cuda.get_device_capability(device)[0] == 9 and bool(importlib.util.find_spec("quack"))


@functools.cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels are installed and run here, which is tried."""
    if not possible(device, dtype):
        return False
    try:
        for call in kernels(device, dtype):
            call()
        torch.cuda.synchronize(device)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        logging.getLogger("bagel_opt").warning("quack-kernels fails here, so layers run without it (%s)", why)
        return False
    return True
