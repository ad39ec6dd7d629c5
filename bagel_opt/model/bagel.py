"""The whole model, and what its programs do before, between and after their layers.

B rows, T text tokens, P patches, N latent tokens, L latent channels, C hidden channels, V vocabulary, S slots,
K adapters.
Programs that fill the context take one row; decoding and flow steps take all rows of a batch, or some. Integers are int64.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import BagelConfig
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.ops import Ops, TorchOps
from bagel_opt.model.transformer import LayerRunner, Started, Transformer, run_layer
from bagel_opt.model.vae import VAE
from bagel_opt.model.vit import Connector, ViT


class TimeEmbedder(nn.Module):
    """A flow time in [0, 1], embedded as 128 cosines and 128 sines of t itself, through an MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = Linear(256, channels)
        self.fc2 = Linear(channels, channels)

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t_B.device))
        angle = t_B[:, None] * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
        return self.fc2(F.silu(self.fc1(wave)))


class Bagel(nn.Module):
    """ops: how the layers' operations are done; whoever runs the model chooses. adapters: how many are kept apart from the
    weights. kinds: of the parts that are quantised."""

    def __init__(self, c: BagelConfig):
        super().__init__()
        self.config = c
        hidden = c.llm.hidden_size
        self.ops: Ops = TorchOps()
        self.adapters = 0
        self.kinds: dict[str, str] = {}
        self.llm = Transformer(c.llm)
        self.vit_encoder = ViT(c.vit)
        self.connector = Connector(c.vit.hidden_size, hidden)
        self.vit_position = Embedding(c.vit_side**2, hidden)
        self.latent_position = Embedding(c.latent_side**2, hidden)
        self.time = TimeEmbedder(hidden)
        self.latent_in = Linear(c.latent_dim, hidden)
        self.latent_out = Linear(hidden, c.latent_dim)
        self.vae = VAE(c.vae)

    @property
    def dtype(self) -> torch.dtype:
        """That of hidden states and caches. Weights may be stored in others; those of norms never are."""
        return self.llm.norm_und.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.llm.norm_und.weight.device

    def quantize(self, kinds: Mapping[str, str]) -> None:
        """Makes room for the products of some parts in other kinds (quantization.py), in place of their weights."""
        experts = {part: [getattr(layer, part) for layer in self.llm.layers] for part in ("und", "gen")}
        parts = experts | {"vit": [*self.vit_encoder.layers], "head": [self.llm.lm_head]}
        self.kinds = dict(kinds)
        for part, kind in kinds.items():
            for product in [m for module in parts[part] for m in module.modules() if isinstance(m, Linear)]:
                product.quantize(kind)

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
        return self.llm.start(self.llm.embed(ids_BT), None, position_BT, kv_len_B, length, True, slots, self.ops)

    def start_vit_context(
        self, embeddings_BPC: Tensor, position_B: Tensor, n_B: Tensor, kv_len_B: Tensor, slots: int
    ) -> Started:
        """Bidirectional prefill of one ViT block of n real patches in one row. -> hidden_BTC"""
        markers = self._markers(kv_len_B)
        x = torch.cat((markers, embeddings_BPC.to(markers.dtype)), dim=1)
        return self.llm.start(x, None, position_B[:, None], kv_len_B, n_B + 2, False, slots, self.ops)

    def start_decode(self, ids_B: Tensor, position_B: Tensor, kv_len_B: Tensor, slots: int) -> Started:
        """One token per row to the logits of the next. -> logits_BV in float32"""
        return self.start_text(ids_B[:, None], position_B, kv_len_B, slots)

    def start_generate(
        self,
        x_BNL: Tensor,
        t_B: Tensor,
        index_BN: Tensor,
        position_B: Tensor,
        n_B: Tensor,
        kv_len_B: Tensor,
        slots: int,
    ) -> Started:
        """One evaluation of the flow, each row at its own time t. -> velocity_BNL in float32, hidden_BNC

        The image's keys land after the row's context and are overwritten by the next step. At time 0 the latents are
        clean: that is how an input image joins the context.
        """
        markers, x_BNC = self._markers(kv_len_B), self.embed_latents(x_BNL, t_B, index_BN)
        return self.llm.start(markers, x_BNC, position_B[:, None], kv_len_B, n_B + 2, False, slots, self.ops)

    # ---- programs without a context

    def vit(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor) -> tuple:
        """One image's patches to embeddings of the transformer. -> embeddings_BPC"""
        x_BPC, seen = self.start_vit(patches_BPK, index_BP, n_B)
        return self.end_vit(self.vit_encoder(x_BPC, seen, self.ops.vit), index_BP)

    def start_vit(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor) -> tuple[Tensor, Any]:
        return self.vit_encoder.start(patches_BPK.to(self.dtype), index_BP, n_B, self.ops.vit)

    def end_vit(self, x_BPC: Tensor, index_BP: Tensor) -> tuple:
        return (self.connector(self.vit_encoder.norm(x_BPC)) + self.vit_position(index_BP),)

    def vae_encode(self, pixels_13HW: Tensor) -> tuple:
        """-> moments_1ZHW: posterior mean and log-variance, stacked, in float32"""
        return (self.vae.encode(pixels_13HW),)

    def vae_decode(self, latent_1ZHW: Tensor) -> tuple:
        """-> picture_HW3, bytes; finite_1, 0 where they stand for NaN or infinity"""
        return self.vae.decode(latent_1ZHW)

    # ---- parts

    def embed_latents(self, x_BNL: Tensor, t_B: Tensor, index_BN: Tensor) -> Tensor:
        """Latent tokens at their times and places, as they enter the first layer: [B, N, C]."""
        x_BNC = self.latent_in(x_BNL.to(self.dtype)) + self.time(t_B, self.dtype)[:, None]
        return x_BNC + self.latent_position(index_BN)

    def velocity(self, hidden_BNC: Tensor) -> Tensor:
        """Final norm and projection: the last layer's output to a velocity [B, N, L] in float32."""
        return self.latent_out(self.llm.norm_gen(hidden_BNC.to(self.dtype))).float()

    def _markers(self, kv_len_B: Tensor) -> Tensor:
        """Embeddings [B, 2, C] of the image block's start and end. Stored first, so that padding comes last:
        an image block shares one position and attends both ways, so its order does not matter to attention."""
        special = self.config.special
        table_VC = self.llm.embed.weight
        markers_2C = torch.stack((table_VC[special.start_of_image], table_VC[special.end_of_image]))
        return markers_2C.expand(kv_len_B.shape[0], -1, -1)
