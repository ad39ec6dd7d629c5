"""The Mixture-of-Transformers (arXiv 2505.14683): two experts per layer, one attention over both.

B rows, T tokens of the understanding expert, N latent tokens, C hidden channels, H query heads, G key-value heads,
D channels per head, S cache slots, K adapters kept apart: share_BK is how much of each counts in each row, None where there
are none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import LLMConfig
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.ops import Ops
from bagel_opt.model.rotary import rope


class QKV(Linear):
    """Products for queries, keys and values in one. -> q [B, T, H, D], k and v [B, T, G, D]"""

    def __init__(self, c: LLMConfig):
        self.heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        super().__init__(c.hidden_size, sum(self.heads) * c.head_dim)

    def forward(self, x: Tensor, share_BK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(super().forward(x, share_BK))

    def split(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` does after its product."""
        return qkv_BTC.unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)


class GateUp(Linear):
    """The MLP's gate and up products in one. -> (gate, up)"""

    def forward(self, x: Tensor, share_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x, share_BK).chunk(2, dim=-1)


class Expert(nn.Module):
    """One expert's share of a layer: everything but the attention. q/k/v and gate/up are single products."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.qkv = QKV(c)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.o = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.norm2 = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = GateUp(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def project(
        self, x_BTC: Tensor, cos: Tensor, sin: Tensor, ops: Ops, share_BK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], normed and rotated."""
        return self.rotated(*self.qkv(self.norm1(x_BTC), share_BK), cos, sin, ops)

    def rotated(
        self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, cos: Tensor, sin: Tensor, ops: Ops
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `project` does after its product."""
        return ops.rotate(self.q_norm(q_BTHD), cos, sin), ops.rotate(self.k_norm(k_BTGD), cos, sin), v_BTGD

    def finish(self, x_BTC: Tensor, attended_BTHD: Tensor, share_BK: Tensor | None = None) -> Tensor:
        """Residual of the attention's output, then the MLP."""
        x_BTC = x_BTC + self.o(attended_BTHD.flatten(2), share_BK)
        gate, up = self.gate_up(self.norm2(x_BTC), share_BK)
        return x_BTC + self.down(F.silu(gate) * up, share_BK)


def angles_of_each(n_und: int, *angles: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the first tokens, which are the understanding expert's, and of the latents, where not all share one."""
    if angles[0].shape[1] == 1:
        return angles, angles
    return tuple(angle[:, :n_und] for angle in angles), tuple(angle[:, n_und:] for angle in angles)


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
        seen: Any,
        ops: Ops,
        share_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """New keys and values go to slots start_B onwards: the understanding expert's tokens, then the latents."""
        und, gen = (cos, sin), (cos, sin)
        n_und = und_BTC.shape[1]
        if gen_BNC is not None:
            und, gen = angles_of_each(n_und, cos, sin)
        q, k, v = self.und.project(und_BTC, *und, ops, share_BK)
        if gen_BNC is not None:
            parts = zip((q, k, v), self.gen.project(gen_BNC, *gen, ops, share_BK), strict=True)
            q, k, v = (torch.cat(part, dim=1) for part in parts)
        k_BSGD, v_BSGD = (ops.write(old, new, start_B) for old, new in ((k_BSGD, k), (v_BSGD, v)))
        out = ops.attend(q, k_BSGD, v_BSGD, seen)
        und_BTC = self.und.finish(und_BTC, out[:, :n_und], share_BK)
        if gen_BNC is not None:
            gen_BNC = self.gen.finish(gen_BNC, out[:, n_und:], share_BK)
        return und_BTC, gen_BNC, k_BSGD, v_BSGD


class LayerRunner(Protocol):
    """How a program runs each layer. `run_layer` just calls it; a runtime may compose others, as runtime/two_streams.py."""

    def __call__(self, layer: Layer, *given: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Takes and returns what `Layer.forward` does."""


def run_layer(layer: Layer, *given: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The plain LayerRunner."""
    return layer(*given)


class Started(NamedTuple):
    """What enters the first layer: new tokens of each expert, and what all layers share."""

    und_BTC: Tensor
    gen_BNC: Tensor | None
    cos: Tensor
    sin: Tensor
    start_B: Tensor
    seen: Any


class Transformer(nn.Module):
    """sections: of the rotary frequencies, where positions have several axes."""

    def __init__(self, c: LLMConfig, sections: Sequence[int] = ()):
        super().__init__()
        self.config, self.sections = c, sections
        self.embed = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm_und = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.norm_gen = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.vocab_size, bias=False)

    def start(
        self,
        und_BTC: Tensor,
        gen_BNC: Tensor | None,
        position: Tensor,
        start_B: Tensor,
        n_new_B: Tensor | int,
        causal: bool,
        slots: int,
        ops: Ops,
    ) -> Started:
        """Prepares new tokens for the layers.

        position: [B, T] for text, [B] where an image block shares one position, or [B, axes, T]. start_B: valid slots before this
        call. n_new_B: how many of the new tokens attention may see (all of them for a causal chunk, whose padding
        causality hides; the real ones for an image block).
        """
        position = position[:, None] if position.ndim == 1 else position
        cos, sin = rope(position, self.config.head_dim, self.config.rope_theta, self.sections)
        queries = und_BTC.shape[1] + (0 if gen_BNC is None else gen_BNC.shape[1])
        seen = ops.visible(start_B + n_new_B, queries, slots, causal)
        return Started(und_BTC, gen_BNC, cos, sin, start_B, seen)

    def forward(
        self,
        started: Started,
        caches: Sequence[Tensor],
        ops: Ops,
        run: LayerRunner = run_layer,
        share_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Runs all layers over new tokens and the cached context. Returns the hidden states before the final norms, and
        the caches: keys of every layer, then values."""
        und_BTC, gen_BNC, cos, sin, start_B, seen = started
        caches, n = list(caches), len(self.layers)
        for i, layer in enumerate(self.layers):
            und_BTC, gen_BNC, caches[i], caches[n + i] = run(
                layer, und_BTC, gen_BNC, cos, sin, caches[i], caches[n + i], start_B, seen, ops, share_BK
            )
        return und_BTC, gen_BNC, caches
