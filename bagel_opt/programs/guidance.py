"""Classifier-free guidance with renormalisation and the Euler step, for all rows at once.

R rows of all batches, N latent tokens, L latent channels.
"""

import torch
from torch import Tensor, nn


class GuidedStep(nn.Module):
    """x <- x - v * dt with the guided velocity v. Every row of a request computes the same step, so that its
    branches stay in step without copies.

    The formulas are the official ones; here the branches are rows, found by index, and everything that differs
    between requests is a number per row.
    """

    def forward(
        self,
        cond_R: Tensor,
        text_R: Tensor,
        img_R: Tensor,
        text_scale_R: Tensor,
        img_scale_R: Tensor,
        renorm_min_R: Tensor,
        renorm_R: Tensor,
        dt: Tensor,
        n_R: Tensor,
        *x_and_v: Tensor,
    ) -> tuple:
        """cond, text, img: the rows of the request's branches. renorm: index into request.RENORM_TYPES. n: real tokens, 0
        for a row that takes no step. dt: [R], or [R, N] where each token has its own. x_and_v: each batch's latents [B, N, L], then each batch's velocities.
        -> new latents of each batch, guided velocities of each batch. Scales of at most 1 switch a guidance off.
        """
        batches = len(x_and_v) // 2
        x, v = torch.cat(x_and_v[:batches]), torch.cat(x_and_v[batches:])
        text_scale, img_scale, renorm_min, renorm = (
            number_R[:, None, None] for number_R in (text_scale_R, img_scale_R, renorm_min_R, renorm_R)
        )
        dt = dt[..., None] if dt.ndim == 2 else dt[:, None, None]
        real_RN1 = (torch.arange(x.shape[1], device=x.device) < n_R[:, None])[..., None]
        v = torch.where(real_RN1, v, 0.0)  # the global norm is the real tokens' alone
        cond, text, img = v[cond_R], v[text_R], v[img_R]

        def norm(u: Tensor, dims: tuple[int, ...]) -> Tensor:
            return u.square().sum(dims, keepdim=True).sqrt()

        def rescaled(u: Tensor, dims: tuple[int, ...]) -> Tensor:
            ratio = norm(cond, dims) / (norm(u, dims) + 1e-8)
            return u * torch.minimum(torch.maximum(ratio, renorm_min), torch.ones_like(ratio))

        guided = text + text_scale * (cond - text)
        guided = torch.where(renorm == 2, rescaled(guided, (2,)), guided)
        guided = torch.where(img_scale > 1, img + img_scale * (guided - img), guided)
        guided = torch.where(renorm == 1, rescaled(guided, (2,)), guided)
        guided = torch.where(renorm == 0, rescaled(guided, (1, 2)), guided)
        v = torch.where(text_scale > 1, guided, cond)
        x = torch.where(real_RN1, x - v * dt, x)
        return *x.chunk(batches), *v.chunk(batches)
