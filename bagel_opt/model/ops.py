"""What differs between eager, compiled and ONNX: four operations, in one object that the model is handed.

The model asks nowhere which backend it has: `Bagel.ops` is all that it knows of one. B rows, T tokens, Q queries, S slots,
H query heads, G key-value heads, D channels per head.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bagel_opt.model import attention, kv_cache
from bagel_opt.model.attention import Visible
from bagel_opt.model.rotary import rotate


class Ops(Protocol):
    """How a layer's four operations are done."""

    backend: str  # as `attention.choose` names it, and bundles keep it

    @property
    def vit(self) -> "Ops":
        """Those of the ViT, whose heads of 72 channels few kernels take."""

    def visible(self, kv_len_B: Tensor, queries: int, slots: int, causal: bool) -> Any:
        """Which keys each query sees; made once per program, shared by its layers, and only `attend` looks inside."""

    def within(self, group_BQ: Tensor, kv_len_B: Tensor) -> Any:
        """As `visible`, of a ViT with windows: each query sees the valid keys of its own group."""

    def attend(self, q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Any) -> Tensor:
        """Attention of prepared visibility: [B, Q, H, D]."""

    def write(self, cache_BSGD: Tensor, new_BTGD: Tensor, start_B: Tensor) -> Tensor:
        """The cache with T new entries at slots start .. start + T of every row. `start + T` may not exceed the slots."""

    def rotate(self, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the channel pairs (i, i + D / 2) of each head by angles [B, T or 1, 1, D / 2]."""


@dataclass(frozen=True)
class TorchOps:
    """By PyTorch, eager or compiled, with one of attention.BACKENDS, and another one for the ViT."""

    backend: str = "sdpa"
    of_vit: str = "sdpa"

    @property
    def vit(self) -> "TorchOps":
        return TorchOps(self.of_vit)

    def visible(self, kv_len_B: Tensor, queries: int, slots: int, causal: bool) -> Visible:
        return attention.visible(self.backend, kv_len_B, queries, slots, causal)

    def within(self, group_BQ: Tensor, kv_len_B: Tensor) -> Visible:
        return attention.within(group_BQ, kv_len_B)

    def attend(self, q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Visible) -> Tensor:
        return attention.attend(self.backend, q_BQHD, k_BSGD, v_BSGD, seen)

    def write(self, cache_BSGD: Tensor, new_BTGD: Tensor, start_B: Tensor) -> Tensor:
        """In place."""
        return kv_cache.write(cache_BSGD, new_BTGD, start_B)

    def rotate(self, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x_BTHD, cos, sin)
