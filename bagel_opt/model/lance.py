"""Lance: the Mixture-of-Transformers with the vision encoder of Qwen2.5-VL and the Wan 2.2 autoencoder; positions have three axes.

B rows, P patches, N latent tokens, C hidden channels. Integers are int64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_opt.lance.config import FRAMES, SIDE, LanceConfig
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.qwen_vit import QwenViT
from bagel_opt.model.wan_vae import WanVAE

NEVER = -1e30  # a logit: finite, so that what is not shows


class Lance(Mixture):
    def __init__(self, c: LanceConfig):
        super().__init__(c, WanVAE(c.vae), QwenViT(c.vit, c.llm.hidden_size))

    def places(self, index_BN: Tensor) -> Tensor:
        """Sines and cosines of a token's frame, row and column, side by side. index: (frame * SIDE + row) * SIDE + column."""
        hidden = self.config.llm.hidden_size
        third = hidden // 3 // 2 * 2
        axes = (
            (index_BN // SIDE**2, FRAMES, third),
            (index_BN // SIDE % SIDE, SIDE, third),
            (index_BN % SIDE, SIDE, hidden - 2 * third),
        )
        return torch.cat([F.embedding(place_BN, self._waves(count, size)) for place_BN, count, size in axes], dim=-1)

    def _waves(self, count: int, size: int) -> Tensor:
        """Of the numbers below `count`: sines, then cosines [count, size], reckoned in float64."""
        place, pair = (torch.arange(n, dtype=torch.float64, device=self.device) for n in (count, size // 2))
        angle = place[:, None] * 10000.0 ** -(pair / (size / 2))
        return torch.cat((angle.sin(), angle.cos()), dim=1).to(self.dtype)

    def end(self, program: str, und_BTC: Tensor, gen_BNC: Tensor | None) -> tuple:
        found = super().end(program, und_BTC, gen_BNC)
        if program != "decode":
            return found
        (logits_BV,) = found
        token_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        return (torch.where(token_V < self.config.token_limit, logits_BV, NEVER),)

    # ---- programs without a context

    def vit(self, patches_BPK: Tensor, index_BP: Tensor, n_B: Tensor) -> tuple:
        """A pair of frames to embeddings of the transformer. -> embeddings [B, P / 4, C]"""
        return (self.vit_encoder(patches_BPK.to(self.dtype), index_BP, n_B, self.ops.vit),)

    def vae_encode(self, pixels_131HW: Tensor) -> tuple:
        """The first frame. -> moments [1, F, H, W, 2 * Z] of the posterior, mean and log-variance, in float32; state"""
        return self.vae.encode(pixels_131HW)

    def vae_encode_next(self, pixels_13FHW: Tensor, *state: Tensor) -> tuple:
        """Further frames, with the state of those before. -> as `vae_encode`"""
        return self.vae.encode(pixels_13FHW, state)

    def vae_decode(self, latent_1Z1HW: Tensor) -> tuple:
        """The first latent frame. -> frames_FHW3, bytes; finite_1, 0 where they stand for NaN or infinity; state"""
        return self.vae.decode(latent_1Z1HW)

    def vae_decode_next(self, latent_1Z1HW: Tensor, *state: Tensor) -> tuple:
        """A further latent frame, with the state of those before. -> as `vae_decode`"""
        return self.vae.decode(latent_1Z1HW, state)
