"""The static KV cache: per layer one key and one value tensor [rows, slots, kv_heads, head_dim]."""

import torch
from torch import Tensor


def empty_cache(
    layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Keys of every layer, then values of every layer.

    Zeros, since unused slots must be finite: attention gives them no weight, but 0 * NaN is NaN.
    """
    return [torch.zeros(rows, slots, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2 * layers)]


def write(cache_BSGD: Tensor, new_BTGD: Tensor, start_B: Tensor) -> Tensor:
    """Puts T new entries at slots start .. start + T of every row, in place. `start + T` may not exceed the slots."""
    rows, length = new_BTGD.shape[:2]
    row_B1 = torch.arange(rows, device=start_B.device)[:, None]
    slot_BT = start_B[:, None] + torch.arange(length, device=start_B.device)
    return cache_BSGD.index_put_((row_B1, slot_BT), new_BTGD.to(cache_BSGD.dtype))
