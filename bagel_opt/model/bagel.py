"""The whole model, and the static-shaped programs that every runtime runs.

B rows, T text tokens, P patches, N latent tokens, L latent channels, C hidden channels, V vocabulary, S slots.
Programs that fill the context take one row; decoding and flow steps take all rows of a batch, or some. Integers are int64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import BagelConfig
from bagel_opt.model.attention import ONNX, Visible
from bagel_opt.model.transformer import Embedding, Started, Transformer
from bagel_opt.model.vae import VAE
from bagel_opt.model.vit import Connector, ViT


class TimeEmbedder(nn.Module):
    """A flow time in [0, 1], embedded as 128 cosines and 128 sines of t itself, through an MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(256, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, t_B: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t_B.device))
        angle = t_B[:, None] * frequency
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(wave)))


class Bagel(nn.Module):
    def __init__(self, c: BagelConfig):
        super().__init__()
        self.config = c
        hidden = c.llm.hidden_size
        self.llm = Transformer(c.llm)
        self.vit_encoder = ViT(c.vit)
        self.connector = Connector(c.vit.hidden_size, hidden)
        self.vit_position = Embedding(c.vit_side**2, hidden)
        self.latent_position = Embedding(c.latent_side**2, hidden)
        self.time = TimeEmbedder(hidden)
        self.latent_in = nn.Linear(c.latent_dim, hidden)
        self.latent_out = nn.Linear(hidden, c.latent_dim)
        self.vae = VAE(c.vae)

    def set_backend(self, backend: str) -> None:
        """Chooses the attention of the transformer. The ViT's 72-channel heads stay with SDPA, but in ONNX."""
        self.llm.backend = backend
        self.vit_encoder.backend = "onnx" if backend == "onnx" else "onnx-cuda" if backend in ONNX else "sdpa"

    # ---- programs of one row: they extend its context

    def text(self, ids_BT: Tensor, position_B: Tensor, kv_len_B: Tensor, *caches: Tensor) -> tuple:
        """Causal prefill of one chunk of text; padding follows the real ids. -> hidden_BTC, caches"""
        return self._through_layers("text", (ids_BT, position_B, kv_len_B), caches)

    def vit(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor) -> tuple:
        """One image's patches to embeddings of the transformer. -> embeddings_BPC"""
        x_BPC, seen = self.start_vit(patches_BPK, index_BP, n_B)
        return self.end_vit(self.vit_encoder(x_BPC, seen), index_BP)

    def vit_context(
        self, embeddings_BPC: Tensor, position_B: Tensor, n_B: Tensor, kv_len_B: Tensor, *caches: Tensor
    ) -> tuple:
        """Bidirectional prefill of one ViT block of n real patches. -> hidden_BTC, caches"""
        return self._through_layers("vit_context", (embeddings_BPC, position_B, n_B, kv_len_B), caches)

    # ---- programs of all rows

    def decode(self, ids_B: Tensor, position_B: Tensor, kv_len_B: Tensor, *caches: Tensor) -> tuple:
        """One token per row to the logits of the next. -> logits_BV in float32, caches"""
        return self._through_layers("decode", (ids_B, position_B, kv_len_B), caches)

    def generate(
        self,
        x_BNL: Tensor,
        t_B: Tensor,
        index_BN: Tensor,
        position_B: Tensor,
        n_B: Tensor,
        kv_len_B: Tensor,
        *caches: Tensor,
    ) -> tuple:
        """One evaluation of the flow, each row at its own time t. -> velocity_BNL in float32, hidden_BNC, caches

        The image's keys land after the row's context and are overwritten by the next step. At time 0 the latents are
        clean: that is how an input image joins the context.
        """
        return self._through_layers("generate", (x_BNL, t_B, index_BN, position_B, n_B, kv_len_B), caches)

    # ---- programs of one picture of any size

    def vae_encode(self, pixels_13HW: Tensor) -> tuple:
        """-> moments_1ZHW: posterior mean and log-variance, stacked, in float32"""
        return (self.vae.encode(pixels_13HW),)

    def vae_decode(self, latent_1ZHW: Tensor) -> tuple:
        """-> picture_HW3, bytes"""
        return (self.vae.decode(latent_1ZHW),)

    # ---- what programs do before and after their layers, so that a runtime can run one compiled layer for all of them

    def start(self, program: str, inputs: tuple[Tensor, ...], slots: int) -> Started:
        """What enters the transformer's first layer."""
        return {
            "text": self._start_text,
            "vit_context": self._start_vit_context,
            "decode": self._start_decode,
            "generate": self._start_latents,
        }[program](*inputs, slots)

    def end(self, program: str, und_BTC: Tensor, gen_BNC: Tensor | None) -> tuple:
        """What the program makes of the last layer's output."""
        if program == "decode":
            return (self.llm.lm_head(self.llm.norm_und(und_BTC[:, 0])).float(),)
        if program == "generate":
            return self.velocity(gen_BNC), gen_BNC
        return (und_BTC,)

    def start_vit(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor) -> tuple[Tensor, Visible]:
        return self.vit_encoder.start(patches_BPK.to(self.vit_encoder.patch.weight.dtype), index_BP, n_B)

    def end_vit(self, x_BPC: Tensor, index_BP: Tensor) -> tuple:
        return (self.connector(self.vit_encoder.norm(x_BPC)) + self.vit_position(index_BP),)

    # ---- parts

    def embed_latents(self, x_BNL: Tensor, t_B: Tensor, index_BN: Tensor) -> Tensor:
        """Latent tokens at their times and places, as they enter the first layer: [B, N, C]."""
        x_BNC = self.latent_in(x_BNL.to(self.latent_in.weight.dtype)) + self.time(t_B)[:, None]
        return x_BNC + self.latent_position(index_BN)

    def velocity(self, hidden_BNC: Tensor) -> Tensor:
        """Final norm and projection: the last layer's output to a velocity [B, N, L] in float32."""
        return self.latent_out(self.llm.norm_gen(hidden_BNC.to(self.latent_out.weight.dtype))).float()

    def _through_layers(self, program: str, inputs: tuple[Tensor, ...], caches: tuple[Tensor, ...]) -> tuple:
        und_BTC, gen_BNC, new = self.llm(self.start(program, inputs, caches[0].shape[1]), caches)
        return *self.end(program, und_BTC, gen_BNC), *new

    def _start_text(self, ids_BT: Tensor, position_B: Tensor, kv_len_B: Tensor, slots: int) -> Started:
        length = ids_BT.shape[1]
        position_BT = position_B[:, None] + torch.arange(length, device=ids_BT.device)
        return self.llm.start(self.llm.embed(ids_BT), None, position_BT, kv_len_B, length, True, slots)

    def _start_decode(self, ids_B: Tensor, position_B: Tensor, kv_len_B: Tensor, slots: int) -> Started:
        return self._start_text(ids_B[:, None], position_B, kv_len_B, slots)

    def _start_vit_context(
        self, embeddings_BPC: Tensor, position_B: Tensor, n_B: Tensor, kv_len_B: Tensor, slots: int
    ) -> Started:
        markers = self._markers(kv_len_B)
        x = torch.cat((markers, embeddings_BPC.to(markers.dtype)), dim=1)
        return self.llm.start(x, None, position_B[:, None], kv_len_B, n_B + 2, False, slots)

    def _start_latents(
        self,
        x_BNL: Tensor,
        t_B: Tensor,
        index_BN: Tensor,
        position_B: Tensor,
        n_B: Tensor,
        kv_len_B: Tensor,
        slots: int,
    ) -> Started:
        markers, x_BNC = self._markers(kv_len_B), self.embed_latents(x_BNL, t_B, index_BN)
        return self.llm.start(markers, x_BNC, position_B[:, None], kv_len_B, n_B + 2, False, slots)

    def _markers(self, kv_len_B: Tensor) -> Tensor:
        """Embeddings [B, 2, C] of the image block's start and end. Stored first, so that padding comes last:
        an image block shares one position and attends both ways, so its order does not matter to attention."""
        special = self.config.special
        table_VC = self.llm.embed.weight
        markers_2C = torch.stack((table_VC[special.start_of_image], table_VC[special.end_of_image]))
        return markers_2C.expand(kv_len_B.shape[0], -1, -1)
