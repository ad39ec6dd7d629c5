"""The Mixture-of-Transformers that every family shares, and what its programs do before, between and after their layers.

A family adds what it sees and draws with: its vision encoder, its autoencoder, the places of latent tokens and the
positions of an image block.

B rows, T text tokens, P embeddings of a ViT, N latent tokens, L latent channels, C hidden channels, V vocabulary, S slots,
K adapters.
Programs that fill the context take one row; decoding and flow steps take all rows of a batch, or some. Integers are int64.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import BagelConfig
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.ops import Ops, TorchOps
from bagel_opt.model.transformer import LayerRunner, Started, Transformer, run_layer


class TimeEmbedder(nn.Module):
    """A flow time in [0, 1], embedded as 128 cosines and 128 sines of t itself, through an MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = Linear(256, channels)
        self.fc2 = Linear(channels, channels)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Of times of any shape: [*shape, C]."""
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angle = t[..., None] * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
        return self.fc2(F.silu(self.fc1(wave)))


class Mixture(nn.Module):
    """What families share. A family brings its autoencoder, its vision encoder and the parts beside that, and says `places`
    and its programs without a context.

    ops: how the layers' operations are done; whoever runs the model chooses. adapters: how many are kept apart from the
    weights. kinds: of the parts that are quantised.
    """

    def __init__(self, c: BagelConfig, vae: nn.Module, vit_encoder: nn.Module, **others: nn.Module):
        super().__init__()
        self.config = c
        self.ops: Ops = TorchOps()
        self.adapters = 0
        self.kinds: dict[str, str] = {}
        self.llm = Transformer(c.llm, c.rope_sections)
        self.vit_encoder = vit_encoder
        for name, module in others.items():
            self.add_module(name, module)
        self.time = TimeEmbedder(c.llm.hidden_size)
        self.latent_in = Linear(c.latent_dim, c.llm.hidden_size)
        self.latent_out = Linear(c.llm.hidden_size, c.latent_dim)
        self.vae = vae

    @property
    def dtype(self) -> torch.dtype:
        """That of hidden states and caches. Weights may be stored in others; those of norms never are."""
        return self.llm.norm_und.weight.dtype

    @property
    def seeing(self) -> list[nn.Module]:
        """The parts that the program "vit" runs."""
        return [self.vit_encoder]

    @property
    def device(self) -> torch.device:
        return self.llm.norm_und.weight.device

    def quantize(self, kinds: Mapping[str, str]) -> None:
        """Makes room for some parts in other kinds (quantization.py), in place of their weights."""
        experts = {part: [getattr(layer, part) for layer in self.llm.layers] for part in ("und", "gen")}
        others = {"vit": [*self.vit_encoder.layers], "head": [self.llm.lm_head], "embeddings": [self.llm.embed]}
        parts = experts | others
        self.kinds = dict(kinds)
        for part, kind in kinds.items():
            for held in [m for module in parts[part] for m in module.modules() if isinstance(m, Linear | Embedding)]:
                held.quantize(kind)

    def places(self, index_BN: Tensor) -> Tensor:
        """What latent tokens have of their places: [B, N, C]."""
        raise NotImplementedError

    # ---- programs with layers: what enters the first, all of them, and what is made of the last one's output

    def through_layers(
        self, program: str, inputs: tuple[Tensor, ...], caches: tuple[Tensor, ...], run: LayerRunner = run_layer
    ) -> tuple:
        """A whole program. Where adapters are kept apart, its last input is share_BK, how much of each counts in each row.
        -> its outputs, then the caches"""
        *inputs, share_BK = inputs if self.adapters else (*inputs, None)
        started = self.start(program, inputs, caches[0].shape[1])
        und_BTC, gen_BNC, new = self.llm(started, caches, self.ops, run, share_BK)
        return *self.end(program, und_BTC, gen_BNC), *new

    def start(self, program: str, inputs: tuple[Tensor, ...], slots: int) -> Started:
        """What enters the transformer's first layer."""
        return {
            "text": self.start_text,
            "vit_context": self.start_vit_context,
            "decode": self.start_decode,
            "generate": self.start_generate,
        }[program](*inputs, slots)

    def end(self, program: str, und_BTC: Tensor, gen_BNC: Tensor | None) -> tuple:
        """What the program makes of the last layer's output."""
        if program == "decode":
            return (self.llm.lm_head(self.llm.norm_und(und_BTC[:, 0])).float(),)
        if program == "generate":
            return self.velocity(gen_BNC), gen_BNC
        return (und_BTC,)

    def start_text(self, ids_BT: Tensor, position_B: Tensor, kv_len_B: Tensor, slots: int) -> Started:
        """Causal prefill of one chunk of text in one row; padding follows the real ids. -> hidden_BTC"""
        length = ids_BT.shape[1]
        position_BT = position_B[:, None] + torch.arange(length, device=ids_BT.device)
        x_BTC = self.llm.embed(ids_BT).to(self.dtype)
        return self.llm.start(x_BTC, None, position_BT, kv_len_B, length, True, slots, self.ops)

    def start_vit_context(
        self, embeddings_BPC: Tensor, position: Tensor, n_B: Tensor, kv_len_B: Tensor, slots: int
    ) -> Started:
        """Bidirectional prefill of one ViT block of n real embeddings in one row. position: [B], or [B, axes, P + 2] where each
        token has its own, the markers first. -> hidden_BTC"""
        markers = self._markers(kv_len_B)
        x = torch.cat((markers, embeddings_BPC.to(markers.dtype)), dim=1)
        return self.llm.start(x, None, position, kv_len_B, n_B + 2, False, slots, self.ops)

    def start_decode(self, ids_B: Tensor, position_B: Tensor, kv_len_B: Tensor, slots: int) -> Started:
        """One token per row to the logits of the next. -> logits_BV in float32"""
        return self.start_text(ids_B[:, None], position_B, kv_len_B, slots)

    def start_generate(
        self,
        x_BNL: Tensor,
        t: Tensor,
        index_BN: Tensor,
        position: Tensor,
        n_B: Tensor,
        kv_len_B: Tensor,
        slots: int,
    ) -> Started:
        """One evaluation of the flow. t: [B], or [B, N] where each token has its own; position: [B], or [B, axes, N + 2].
        -> velocity_BNL in float32, hidden_BNC

        The image's keys land after the row's context and are overwritten by the next step. At time 0 the latents are
        clean: that is how an input image joins the context.
        """
        markers, x_BNC = self._markers(kv_len_B), self.embed_latents(x_BNL, t, index_BN)
        return self.llm.start(markers, x_BNC, position, kv_len_B, n_B + 2, False, slots, self.ops)

    # ---- parts

    def embed_latents(self, x_BNL: Tensor, t: Tensor, index_BN: Tensor) -> Tensor:
        """Latent tokens at their times and places, as they enter the first layer: [B, N, C]."""
        time = self.time(t, self.dtype)
        time = time[:, None] if t.ndim == 1 else time
        return self.latent_in(x_BNL.to(self.dtype)) + time + self.places(index_BN)

    def velocity(self, hidden_BNC: Tensor) -> Tensor:
        """Final norm and projection: the last layer's output to a velocity [B, N, L] in float32."""
        return self.latent_out(self.llm.norm_gen(hidden_BNC.to(self.dtype))).float()

    def _markers(self, kv_len_B: Tensor) -> Tensor:
        """Embeddings [B, 2, C] of the image block's start and end. Stored first, so that padding comes last:
        an image block attends both ways, so its order does not matter to attention."""
        special = self.config.special
        markers_2C = torch.stack(
            [self.llm.embed.row(token) for token in (special.start_of_image, special.end_of_image)]
        )
        return markers_2C.to(self.dtype).expand(kv_len_B.shape[0], -1, -1)
