"""Example inputs to trace programs with."""

import itertools
from collections.abc import Iterable, Set

import torch
from torch import Tensor

from bagel_opt.lance.config import Config
from bagel_opt.profile import Profile
from bagel_opt.programs.signatures import MAX_ORDER, Signature, cache_names, cache_shape, sized

SIDES = {"height": 64, "width": 96}  # of pictures, whose dimensions stay free
MARKERS = 2  # of an image block


def profile_to_trace(config: Config, others: Iterable[int]) -> Profile:
    """Sizes by which a tensor's shape tells which of its dimensions are free: odd ones, none of which with or without an
    image's markers is another or a dimension of the model's own. others: the dimensions of its weights."""
    c, taken = config, {*others, MAX_ORDER + 1, config.latent_dim, config.vit.patch_dim}
    for heads in (c.llm.num_attention_heads, c.llm.num_key_value_heads, c.vit.num_attention_heads):
        taken |= {heads, 3 * heads}
    taken |= {c.llm.head_dim, c.llm.head_dim // 2, c.llm.num_attention_heads + 2 * c.llm.num_key_value_heads}
    found: list[int] = []
    for size in itertools.count(11, 2):
        if not taken & {size, size + MARKERS}:
            found.append(size)
            taken |= {size, size + MARKERS, size - MARKERS}
        if len(found) == 4:
            break
    rows, text, patches, latents = found
    slots = next(n for n in itertools.count(2 * (latents + patches), 2) if not taken & {n, n // 2})
    return Profile("any", rows, slots, text, patches, latents)


def free_sides(profile: Profile) -> frozenset[int]:
    """What of the sizes of a profile to trace with is free in a tensor: of all slots the half that a mask has, too."""
    p = profile
    images = {n + extra for n in (p.patches, p.latents) for extra in (0, MARKERS)}
    return frozenset({p.rows, p.text, p.slots, p.slots // 2, *images})


def free_axes(x: Tensor, sides: Set[int]) -> dict | None:
    """For torch.export."""
    return {axis: torch.export.Dim.DYNAMIC for axis, side in enumerate(x.shape) if side in sides} or None


def _dimension(side: str, downsample: int) -> object:
    """A free side for torch.export, as a multiple of the latents' side. What a VAE makes of sides that just any number may be are
    long formulas, with which tracing and compiling take up to twice as long."""
    name = side.removeprefix("latent_").partition("/")[0]
    size, latents = sized((side, f"latent_{name}"), SIDES, downsample)
    return size // latents * torch.export.Dim(name)


def example_inputs(
    config: Config, signature: Signature, profile: Profile, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[dict | None]]:
    """(inputs, caches, dimensions of each input for torch.export that are free in every profile)"""
    inputs = [
        torch.zeros(
            sized(shape, SIDES, config.vae.downsample),
            dtype=dtype if kind == "model" else getattr(torch, kind),
            device=device,
        )
        for shape, kind in signature.inputs.values()
    ]
    free = [
        {axis: _dimension(side, config.vae.downsample) for axis, side in enumerate(shape) if isinstance(side, str)}
        or None
        for shape, _ in signature.inputs.values()
    ]
    caches = []
    if signature.cache_rows:
        shape = cache_shape(config, signature.cache_rows, profile.slots)
        caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in cache_names(config)]
    return inputs, caches, free
