"""The SigLIP encoder (arXiv 2303.15343) over one padded image, and the connector into the transformer.

B images, P patches, C hidden channels, H heads, D channels per head.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import ViTConfig
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.ops import Ops


class ViTLayer(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size)
        self.out = Linear(c.hidden_size, c.hidden_size)
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.fc1 = Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x_BPC: Tensor, seen: Any, ops: Ops) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BPC)).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        x_BPC = x_BPC + self.out(ops.attend(q, k, v, seen).flatten(2))
        return x_BPC + self.fc2(F.gelu(self.fc1(self.norm2(x_BPC)), approximate="tanh"))


class ViT(nn.Module):
    """Patches [B, P, patch * patch * channels], flattened as (row, column, channel), to features [B, P, C]: start,
    forward, norm."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.patch = Linear(c.patch_dim, c.hidden_size)
        self.position = Embedding(c.num_positions, c.hidden_size)
        self.layers = nn.ModuleList(ViTLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def start(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor, ops: Ops) -> tuple[Tensor, Any]:
        """What enters the first layer, and what all layers share. index_BP: places in the position table; n_B: real
        patches, which see only each other."""
        x_BPC = self.patch(patches_BPK) + self.position(index_BP)
        return x_BPC, ops.visible(n_B, x_BPC.shape[1], x_BPC.shape[1], causal=False)

    def forward(self, x_BPC: Tensor, seen: Any, ops: Ops) -> Tensor:
        """Runs all layers."""
        for layer in self.layers:
            x_BPC = layer(x_BPC, seen, ops)
        return x_BPC


class Connector(nn.Module):
    """Two-layer MLP from ViT channels to the transformer's."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.fc1 = Linear(c_in, c_out)
        self.fc2 = Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
