"""The Mixture-of-Transformers (arXiv 2505.14683): two experts per layer, one attention over both.

B rows, T tokens of the understanding expert, N latent tokens, C hidden channels, H query heads, G key-value heads,
D channels per head, S cache slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import LLMConfig
from bagel_opt.model import attention, cache
from bagel_opt.model.attention import Visible


class Embedding(nn.Embedding):
    """A table. One without memory has nothing to initialise; torch would import its compiler for that, two seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class QKV(nn.Linear):
    """Products for queries, keys and values in one. -> q [B, T, H, D], k and v [B, T, G, D]"""

    def __init__(self, c: LLMConfig):
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        super().__init__(c.hidden_size, sum(self.heads) * c.head_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(super().forward(x))

    def split(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does after its product."""
        return qkv_BTC.unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)


class GateUp(nn.Linear):
    """The MLP's gate and up products in one. -> (gate, up)"""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).chunk(2, dim=-1)


class Expert(nn.Module):
    """One expert's share of a layer: everything but the attention. q/k/v and gate/up are single products."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.qkv = QKV(c)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.o = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.norm2 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = GateUp(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def project(self, x_BTC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], normed and rotated."""
        return self.rotated(*self.qkv(self.norm1(x_BTC)), cos, sin)

    def rotated(
        self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` does after its product."""
        return rotate(self.q_norm(q_BTHD), cos, sin), rotate(self.k_norm(k_BTGD), cos, sin), v_BTGD

    def finish(self, x_BTC: Tensor, attended_BTHD: Tensor) -> Tensor:
        """Residual of the attention's output, then the MLP."""
        x_BTC = x_BTC + self.o(attended_BTHD.flatten(2))
        gate, up = self.gate_up(self.norm2(x_BTC))
        return x_BTC + self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.und = Expert(c)
        self.gen = Expert(c)

    def forward(
        self,
        und_BTC: Tensor,
        gen_BNC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        start_B: Tensor,
        seen: Visible,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """New keys and values go to slots start_B onwards: the understanding expert's tokens, then the latents."""
        q, k, v = self.und.project(und_BTC, cos, sin)
        if gen_BNC is not None:
            parts = zip((q, k, v), self.gen.project(gen_BNC, cos, sin), strict=True)
            q, k, v = (torch.cat(part, dim=1) for part in parts)
        onnx = backend in attention.ONNX
        k_BSGD, v_BSGD = (cache.write(old, new, start_B, onnx) for old, new in ((k_BSGD, k), (v_BSGD, v)))
        out = attention.attend(backend, q, k_BSGD, v_BSGD, seen)
        n_und = und_BTC.shape[1]
        und_BTC = self.und.finish(und_BTC, out[:, :n_und])
        if gen_BNC is not None:
            gen_BNC = self.gen.finish(gen_BNC, out[:, n_und:])
        return und_BTC, gen_BNC, k_BSGD, v_BSGD


class Started(NamedTuple):
    """What enters the first layer: new tokens of each expert, and what all layers share."""

    und_BTC: Tensor
    gen_BNC: Tensor | None
    cos: Tensor
    sin: Tensor
    start_B: Tensor
    seen: Visible


class Transformer(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.config = c
        self.backend = "sdpa"
        self.call_layer: Callable = Layer.__call__  # a runtime may have its own way, as runtime/cuda.py has
        self.embed = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm_und = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.norm_gen = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def start(
        self,
        und_BTC: Tensor,
        gen_BNC: Tensor | None,
        position: Tensor,
        start_B: Tensor,
        n_new_B: Tensor | int,
        causal: bool,
        slots: int,
    ) -> Started:
        """Prepares new tokens for the layers.

        position: [B, T] for text, [B, 1] where an image block shares one position. start_B: valid slots before this
        call. n_new_B: how many of the new tokens attention may see (all of them for a causal chunk, whose padding
        causality hides; the real ones for an image block).
        """
        cos, sin = rope(position, self.config.head_dim, self.config.rope_theta)
        queries = und_BTC.shape[1] + (0 if gen_BNC is None else gen_BNC.shape[1])
        seen = attention.visible(self.backend, start_B + n_new_B, queries, slots, causal)
        return Started(und_BTC, gen_BNC, cos, sin, start_B, seen)

    def forward(self, started: Started, caches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Runs all layers over new tokens and the cached context. Returns the hidden states before the final norms, and
        the caches: keys of every layer, then values."""
        und_BTC, gen_BNC, cos, sin, start_B, seen = started
        caches, n = list(caches), len(self.layers)
        for i, layer in enumerate(self.layers):
            und_BTC, gen_BNC, caches[i], caches[n + i] = self.call_layer(
                layer, und_BTC, gen_BNC, cos, sin, caches[i], caches[n + i], start_B, seen, self.backend
            )
        return und_BTC, gen_BNC, caches


def rope(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, D / 2] of rotary positions [B, T], always in float32 (arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = (position.float()[..., None] * (1.0 / theta**exponent))[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs (i, i + D / 2) of each head. In ONNX that is one node."""
    if torch.onnx.is_in_onnx_export():
        return _rotary_embedding(x_BTHD, cos, sin)
    a, b = x_BTHD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHD.dtype)


def _rotary_embedding(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RotaryEmbedding of opset 23 in its 3-D form, which wants an angle for each token."""
    tokens, heads = x_BTHD.shape[1:3]
    tables = (table.expand(-1, tokens, -1, -1).squeeze(2).to(x_BTHD.dtype) for table in (cos, sin))
    x = x_BTHD.flatten(2)
    shape = {"dtype": x.dtype, "shape": x.shape, "version": 23}
    return torch.onnx.ops.symbolic("RotaryEmbedding", (x, *tables), {"num_heads": heads}, **shape).view(x_BTHD.shape)
