"""The vision encoder of Qwen2.5-VL (arXiv 2502.13923) over one padded pair of frames, module names as in its published file.

No patch sees beyond its pair of frames, so a video is encoded pair by pair. B pairs, P patches, C hidden channels, H heads,
D channels per head. Patches that become one token are neighbours in P.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.lance.config import PLACES, QwenViTConfig
from bagel_opt.model.linear import Linear
from bagel_opt.model.ops import Ops


class Attention(nn.Module):
    def __init__(self, c: QwenViTConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = Linear(c.hidden_size, c.hidden_size)

    def forward(self, x_BPC: Tensor, cos: Tensor, sin: Tensor, seen: Any, ops: Ops) -> Tensor:
        q, k, v = self.qkv(x_BPC).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
        return self.proj(ops.attend(q, k, v, seen).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: QwenViTConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: QwenViTConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, 1e-6)
        self.attn = Attention(c)
        self.norm2 = nn.RMSNorm(c.hidden_size, 1e-6)
        self.mlp = MLP(c)

    def forward(self, x_BPC: Tensor, cos: Tensor, sin: Tensor, seen: Any, ops: Ops) -> Tensor:
        x_BPC = x_BPC + self.attn(self.norm1(x_BPC), cos, sin, seen, ops)
        return x_BPC + self.mlp(self.norm2(x_BPC))


class PatchEmbed(nn.Module):
    """A convolution of the size of its stride is a product."""

    def __init__(self, c: QwenViTConfig):
        super().__init__()
        self.proj = Linear(c.patch_dim, c.hidden_size, bias=False)


class Merger(nn.Module):
    """Patches that are neighbours, joined to a token of the transformer."""

    def __init__(self, c: QwenViTConfig, channels: int):
        super().__init__()
        self.joined = c.spatial_merge_size**2
        wide = self.joined * c.hidden_size
        self.ln_q = nn.RMSNorm(c.hidden_size, 1e-6)
        self.mlp = nn.ModuleDict({"0": Linear(wide, wide), "2": Linear(wide, channels)})

    def forward(self, x_BPC: Tensor) -> Tensor:
        x_BPC = x_BPC[:, : x_BPC.shape[1] // self.joined * self.joined]
        x = self.ln_q(x_BPC).unflatten(1, (-1, self.joined)).flatten(2)
        return self.mlp["2"](F.gelu(self.mlp["0"](x)))


class QwenViT(nn.Module):
    """Patches [B, P, channels * 2 * patch * patch] to tokens [B, P / 4, channels of the transformer]."""

    def __init__(self, c: QwenViTConfig, channels: int):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.merger = Merger(c, channels)

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def forward(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor, ops: Ops) -> Tensor:
        """index: row * PLACES + column of each patch. n: real patches, which see only each other."""
        c, count = self.config, patches_BPK.shape[1]
        x_BPC = self.patch_embed.proj(patches_BPK)
        row_BP, column_BP = index_BP // PLACES, index_BP % PLACES
        window = c.window_size // c.patch_size
        windows_BP = (row_BP // window) * PLACES + column_BP // window
        seen = ops.visible(n_B, count, count, causal=False), ops.within(windows_BP, n_B)
        quarter = (
            c.hidden_size // c.num_attention_heads // 4
        )  # of a head: its pairs that turn with the row, or the column
        frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=x_BPC.device) / quarter)
        angle = torch.cat([place_BP.float()[..., None] * frequency for place_BP in (row_BP, column_BP)], dim=-1)[
            :, :, None
        ]
        cos, sin = angle.cos(), angle.sin()
        for number, block in enumerate(self.blocks):
            x_BPC = block(x_BPC, cos, sin, seen[number not in c.fullatt_block_indexes], ops)
        return self.merger(x_BPC)
