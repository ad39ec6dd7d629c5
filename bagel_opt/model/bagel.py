"""BAGEL: the Mixture-of-Transformers with the SigLIP encoder, the FLUX autoencoder and tables of positions.

B rows, P patches, N latent tokens, C hidden channels. Integers are int64.
"""

from typing import Any

from torch import Tensor, nn

from bagel_opt.config import BagelConfig
from bagel_opt.model.linear import Embedding
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.vae import VAE
from bagel_opt.model.vit import Connector, ViT


class Bagel(Mixture):
    def __init__(self, c: BagelConfig):
        hidden = c.llm.hidden_size
        super().__init__(
            c,
            VAE(c.vae),
            ViT(c.vit),
            connector=Connector(c.vit.hidden_size, hidden),
            vit_position=Embedding(c.vit_side**2, hidden),
            latent_position=Embedding(c.latent_side**2, hidden),
        )

    @property
    def seeing(self) -> list[nn.Module]:
        return [self.vit_encoder, self.connector, self.vit_position]

    def places(self, index_BN: Tensor) -> Tensor:
        return self.latent_position(index_BN)

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
