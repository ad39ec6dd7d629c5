"""Example inputs to trace programs with."""

import torch
from torch import Tensor

from bagel_opt.config import BagelConfig
from bagel_opt.profile import Profile
from bagel_opt.programs.signatures import Signature, cache_names, cache_shape

SIDES = {"height": 64, "width": 96, "latent_height": 8, "latent_width": 12}  # of dimensions that stay free


def example_inputs(
    config: BagelConfig, signature: Signature, profile: Profile, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[dict | None]]:
    """(inputs, caches, free dimensions of each input for torch.export)"""
    inputs = [
        torch.zeros(
            [SIDES.get(side, side) for side in shape],
            dtype=dtype if kind == "model" else getattr(torch, kind),
            device=device,
        )
        for shape, kind in signature.inputs.values()
    ]
    free = [
        {axis: torch.export.Dim.DYNAMIC for axis, side in enumerate(shape) if isinstance(side, str)} or None
        for shape, _ in signature.inputs.values()
    ]
    caches = []
    if signature.cache_rows:
        shape = cache_shape(config, signature.cache_rows, profile.slots)
        caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in cache_names(config)]
    return inputs, caches, free
