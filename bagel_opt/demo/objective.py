"""The training losses, computed by the modules of inference over whole sequences at once.

R rows, T text slots, U = T plus the ViT's 64 slots, N latent slots, C hidden channels, K latent channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_opt.config import VAEConfig
from bagel_opt.demo.data import IGNORED, Packed
from bagel_opt.model.attention import Visible
from bagel_opt.model.bagel import Bagel
from bagel_opt.model.ops import TorchOps
from bagel_opt.model.rotary import rope
from bagel_opt.model.transformer import Layer

# Times are logit-normal (arXiv 2403.03206). The mean shifts them towards noise as timestep_shift = exp(mean) does.
TIME_MEAN, TIME_DEVIATION = 0.8, 1.2
OPS = TorchOps("sdpa")


def pixels(pictures_PHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes to [P, 3, H, W] in [-1, 1]."""
    return (pictures_PHWC.to(torch.float32) / 127.5 - 1).permute(0, 3, 1, 2).to(dtype)


def tokens(x_PCHW: Tensor, side: int) -> Tensor:
    """Cuts into squares: [P, tokens, side * side * channels], each as (row, column, channel), as `images.tokens` does."""
    p, c, h, w = x_PCHW.shape
    cut = x_PCHW.reshape(p, c, h // side, side, w // side, side)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(p, h // side * (w // side), side * side * c)


def scaled_latents(moments_P2ZHW: Tensor, noise_PZHW: Tensor, c: VAEConfig) -> Tensor:
    """A draw from the VAE's posterior, scaled to unit variance: [P, Z, H, W] in float32."""
    mean, log_variance = moments_P2ZHW.float().chunk(2, dim=1)
    return c.scale_factor * (mean + (0.5 * log_variance).exp() * noise_PZHW - c.shift_factor)


class Lookup(torch.autograd.Function):
    """Rows of a table. The gradient is a product with one-hot rows: unlike torch's own it is deterministic and asks
    the host for nothing, so that a CUDA graph can hold it."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VC: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table_VC)
        return table_VC[ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        hot = (ids.flatten()[:, None] == torch.arange(ctx.rows, device=ids.device)).to(gradient.dtype)
        return None, hot.T @ gradient.flatten(0, -2)


def use_lookups(model: Bagel) -> None:
    """Makes the model's tables use `Lookup`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.forward = functools.partial(lambda table, ids: Lookup.apply(ids, table.weight), module)


def visible(position_RQ: Tensor, dtype: torch.dtype) -> Visible:
    """Every slot sees the used slots of no later position. Unused ones see themselves: attention to nothing is NaN."""
    own, other = position_RQ[:, None, :, None], position_RQ[:, None, None, :]
    sees = ((other >= 0) & (other <= own)) | torch.eye(own.shape[2], dtype=torch.bool, device=own.device)
    bias = torch.zeros(sees.shape, dtype=dtype, device=own.device).masked_fill(~sees, -torch.inf)
    return Visible(torch.full((len(own),), own.shape[2], device=own.device), False, bias)


def run_layer(
    layer: Layer, und: Tensor, gen: Tensor | None, ropes: tuple[Tensor, ...], seen: Visible
) -> tuple[Tensor, Tensor | None]:
    """One layer over sequences without a cache: what inference does in several calls, in one."""
    q, k, v = layer.und.project(und, *ropes[:2], OPS)
    if gen is not None:
        parts = zip((q, k, v), layer.gen.project(gen, *ropes[2:], OPS), strict=True)
        q, k, v = (torch.cat(part, dim=1) for part in parts)
    if q.is_cuda:  # torch's fused kernels with a mask and a gradient take no grouped queries
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    out = OPS.attend(q, k, v, seen)
    length = und.shape[1]
    und = layer.und.finish(und, out[:, :length])
    return und, None if gen is None else layer.gen.finish(gen, out[:, length:])


def forward(
    model: Bagel,
    rows: Packed,
    patches_PNK: Tensor,
    clean_RNK: Tensor | None,
    noisy_RNK: Tensor | None,
    t_R: Tensor | None,
    layer_step: Callable = run_layer,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states before the final norms: of the text [R, T, C], and of the noisy latents at time t, if any [R, N, C]."""
    c, llm = model.config, model.llm
    und, position = llm.embed(rows.ids), rows.positions
    grid = torch.arange(patches_PNK.shape[1], device=und.device).expand(len(und), -1)
    if "vit" in rows.images:
        at_R, picture_R = rows.images["vit"]
        full = torch.full_like(at_R, grid.shape[1])
        vit, *_ = model.vit(patches_PNK[picture_R], grid, full)
        und, position = torch.cat((vit, und), dim=1), torch.cat((at_R[:, None].expand_as(grid), position), dim=1)
    gen, gen_position = None, None
    if noisy_RNK is not None:
        latents, times, places = [noisy_RNK], [t_R], [rows.images["noisy"][0]]
        if clean_RNK is not None:
            latents, times = [clean_RNK, *latents], [torch.zeros_like(t_R), *times]
            places = [rows.images["clean"][0], *places]
        n = noisy_RNK.shape[1]
        gen = model.latent_in(torch.cat(latents, dim=1).to(und.dtype))
        gen = gen + torch.cat([model.time(t, und.dtype)[:, None].expand(-1, n, -1) for t in times], dim=1)
        gen = gen + model.latent_position(grid).repeat(1, len(latents), 1)
        gen_position = torch.cat([place[:, None].expand(-1, n) for place in places], dim=1)
    seen = visible(position if gen is None else torch.cat((position, gen_position), dim=1), und.dtype)
    ropes = [rope(p.clamp(min=0), c.llm.head_dim, c.llm.rope_theta) for p in (position, gen_position) if p is not None]
    ropes = tuple(table for pair in ropes for table in pair)
    for layer in llm.layers:
        und, gen = layer_step(layer, und, gen, ropes, seen)
    return und[:, -rows.ids.shape[1] :], None if gen is None else gen[:, -noisy_RNK.shape[1] :]


class Noise(NamedTuple):
    """What the flow of one kind of batch is drawn from: normal [R, N, K], and times [R]."""

    noise: Tensor
    t: Tensor


def draw_noise(rows: Packed, shape: tuple[int, int], generator: torch.Generator) -> Noise | None:
    """For the latents [N, K] that rows are to draw, if any."""
    if "noisy" not in rows.images:
        return None
    count, device = len(rows.ids), generator.device
    noise = torch.randn(count, *shape, generator=generator, device=device)
    t = torch.randn(count, generator=generator, device=device)
    return Noise(noise, (TIME_MEAN + TIME_DEVIATION * t).sigmoid())


def losses(
    model: Bagel,
    rows: Packed,
    patches_PNK: Tensor,
    latents_PNK: Tensor,
    drawn: Noise | None,
    layer_step: Callable = run_layer,
) -> dict[str, Tensor]:
    """{"flow": mean squared error of velocities, "text": cross-entropy}; of each, where rows have any (arXiv 2210.02747)."""
    clean = noisy = target = None
    if "clean" in rows.images:
        clean = latents_PNK[rows.images["clean"][1]]
    if drawn is not None:
        picture = latents_PNK[rows.images["noisy"][1]]
        noisy, target = torch.lerp(picture, drawn.noise, drawn.t[:, None, None]), drawn.noise - picture
    text, hidden = forward(model, rows, patches_PNK, clean, noisy, drawn and drawn.t, layer_step)
    found = {}
    if hidden is not None:
        real = (rows.images["noisy"][0] >= 0).float()
        error = (model.velocity(hidden) - target).square().mean(dim=(1, 2))
        found["flow"] = (error * real).sum() / real.sum().clamp(min=1)
    if rows.labels is not None:
        logits = model.llm.lm_head(model.llm.norm_und(text)).float()
        found["text"] = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED)
    return found
