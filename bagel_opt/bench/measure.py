"""What a full-size contender is asked for, and how long it takes."""

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel_opt.bench.contenders import Ours
from bagel_opt.bench.full_size_official import DEFAULTS, PROMPT, Official
from bagel_opt.runtime.torch import TorchRuntime

EDIT = {**DEFAULTS, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
EDIT_POINTS = 9
PEAK = "peak memory so far, GB"
CONTEXT = 128  # slots of it before an evaluation of the flow that is timed by itself
SIZES = {"1024x1024": (1024, 1024), "768x1024": (1024, 768), "512x512": (512, 512)}  # names are width x height


def picture(height: int, width: int) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 30).convert("RGB")


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def evaluation(runtime: TorchRuntime, rows: int, latents: int) -> tuple[Callable[[], object], list[Tensor]]:
    """One evaluation of the flow, with the adapters that count by default, and its caches."""
    device = runtime.device
    caches = runtime.caches(rows, -(-(latents + CONTEXT + 2) // 256) * 256)
    counts = [torch.full((rows,), n, device=device) for n in (latents, CONTEXT)]
    index = torch.arange(latents, device=device).expand(rows, -1)
    x = torch.randn(rows, latents, runtime.config.latent_dim, device=device)
    c = runtime.config
    t = torch.ones(rows, *c.time_shape(latents), device=device)
    position = torch.zeros(rows, *c.position_shape(latents), dtype=torch.int64, device=device)
    inputs = [x, t, index, position, *counts]
    if runtime.adapters:
        inputs.append(torch.tensor([[*runtime.adapters.values()]] * rows, device=device))
    return lambda: runtime.run("generate", inputs, caches), caches


def drawing(
    contender: Any, name: str, inputs: list, repeats: int, count: int = 1, **options: Any
) -> dict[str, list[float]]:
    """Seconds of a picture or a video after a warm-up: from its filled contexts to its latents, and from the request to pixels."""
    short = {**options, "num_timesteps": 8}  # reaches the times without guidance, too
    begun = time.perf_counter()
    contender.draw(inputs, count, **short)
    found = {f"{name}: first call, s": [time.perf_counter() - begun]}
    contender.draw(inputs, count, **short)  # what ran once in the first call may be captured in the second
    for _ in range(repeats):
        whole = seconds(lambda: contender.draw(inputs, count, **options))
        found.setdefault(f"{name}: denoising, s", []).append(max(contender.drawn))
        found.setdefault(f"{name}: whole, s", []).append(whole)
    return found


def figures(
    contender: Ours | Official,
    repeats: int,
    progress: Callable[[str], None],
    sizes: Mapping[str, tuple[int, int]] = MappingProxyType(SIZES),
) -> dict[str, list[float]]:
    """Seconds, and milliseconds per step or token, of each work after a warm-up. sizes: of pictures, by name."""
    found: dict[str, list[float]] = {}

    def draws(name: str, inputs: list, count: int = 1, repeats: int = repeats, **options: Any) -> None:
        progress(name)
        found.update(drawing(contender, name, inputs, repeats, count, **options))

    latents = [np.random.default_rng(0).standard_normal((1, 16, 128, 128), np.float32)]
    torch.cuda.reset_peak_memory_stats()
    for name, (height, width) in sizes.items():
        draws(name, [PROMPT], height=height, width=width, **DEFAULTS)
    draws("edit 1024x1024, 8 steps", [picture(1024, 1024), "make it red"], **{**EDIT, "num_timesteps": EDIT_POINTS})
    progress("tokens")
    contender.tokens()
    found["token, ms"] = [t for _ in range(repeats) for t in contender.tokens()]
    contender.decode(latents)
    found["VAE decode 1024x1024, s"] = [seconds(lambda: contender.decode(latents)) for _ in range(5)]
    found[PEAK] = [torch.cuda.max_memory_allocated() / 1e9]
    found["and held by torch, GB"] = [torch.cuda.max_memory_reserved() / 1e9]
    if contender.several:  # the official code draws and writes for one request at a time, the bundles for one row
        contender.tokens(8)
        found["token of 8 rows, ms"] = contender.tokens(8)
        asked = [picture(1024, 1024), PROMPT]
        contender.tokens(inputs=asked)
        found["token after a picture, ms"] = contender.tokens(inputs=asked)
        draws("4 pictures 1024x1024", [PROMPT], 4, 1, height=1024, width=1024, **DEFAULTS)
    return found
