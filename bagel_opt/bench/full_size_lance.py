"""Lance at its published sizes with random weights on one GPU: python -m bagel_opt bench --preset lance [--official DIR]

Ours under torch.compile and the official code, in one process and one run, on the same weights in the same memory.

Of the sizes, the ViT's, the vocabulary's tokens, mrope_section and the autoencoder's are in the official code
(common/model/hacks.py, modeling/vae/wan/vae2_2.py). The transformer's are Qwen2.5-VL-3B's, of whose width the paper is: the
published llm_config.json has not been seen, nor has rope_theta or the vocabulary's length.
"""

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode

from bagel_opt.bench.contenders import Ours, in_process, random_model
from bagel_opt.bench.full_size import bytes_per_token, fresh_float32, relative, report, scaling, tflop
from bagel_opt.bench.full_size_gpus import memory_of_gpus
from bagel_opt.bench.full_size_lance_official import OfficialLance, check_checkout
from bagel_opt.bench.full_size_official import PROMPT
from bagel_opt.bench.measure import CONTEXT, drawing, picture, seconds
from bagel_opt.config import LLMConfig, SpecialTokens
from bagel_opt.lance.config import GENERATION, LanceConfig, QwenViTConfig, WanConfig
from bagel_opt.lance.pictures import LanceCanvas
from bagel_opt.model.wan_vae import WanVAE
from bagel_opt.request import Request
from bagel_opt.sampling import lance as chat
from bagel_opt.sampling.planning import make_plan
from bagel_opt.tokenizer import SPECIAL, Tokenizer

PUBLISHED = LanceConfig(
    llm=LLMConfig(2048, 11008, 36, 16, 2, 151936),
    vit=QwenViTConfig(1280, 3420, 32, 16, 14, 112, 2, (7, 15, 23, 31)),
    vae=WanConfig(
        (160, 160, 320, 640, 640), (1024, 1024, 1024, 512, 256), (False, True, True), (True, True, False), 2, 48
    ),
    special=SpecialTokens(151644, 151645, 151652, 151653),
    mrope_section=(16, 24, 24),
    token_limit=151936,
    generation=GENERATION,
)
SIDE = 768
# What is drawn from a text: pictures and videos of 480p and 2 seconds, 12 frames a second, in the steps that are the default.
WORKS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        f"{SIDE}x{SIDE}": {"output": "image", "height": SIDE, "width": SIDE},
        "25 frames 848x480": {"output": "video", "height": 480, "width": 848, "num_frames": 25},
    }
)
EDITED, ASKED = "make it red", "what is there?"
EDIT_STEPS = 8
PRODUCT = 8192  # side of the matrices by which the card's speed is measured


def run_lance(
    checkout: str | None, repeats: int, progress: Callable[[str], None], save: Callable[[dict], None]
) -> dict:
    """All figures, with the card, the versions, and the seconds in which the card could at best compute what is timed.
    save(results) is called when there are more. Raises ValueError without a GPU, and FileNotFoundError where `checkout` is none
    of the official code."""
    if checkout:
        check_checkout(checkout)
    if not torch.cuda.is_available():
        raise ValueError("the lance preset needs a CUDA device, and this torch finds none")
    return measured(PUBLISHED, torch.device("cuda"), checkout, repeats, progress, save)


def measured(
    config: LanceConfig,
    device: torch.device,
    checkout: str | None,
    repeats: int,
    progress: Callable[[str], None],
    save: Callable[[dict], None],
) -> dict:
    """`run_lance` of any sizes on any device."""
    tokenizer = words()
    config = dataclasses.replace(config, special=tokenizer.special)
    model = random_model(config, device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((SIDE // config.token_pixels) ** 2, config.latent_dim, generator=generator)
    noise = noise.to(model.dtype).float()  # as the official code takes it
    results, velocities = report(), {}
    if checkout:
        official = OfficialLance(checkout, model, tokenizer)
        found = figures(official, config, repeats, lambda what: progress(f"official code: {what}"))
        results["figures"]["official"] = found
        save(results)
        velocities["official"] = official.velocity(noise, PROMPT, SIDE)
        del official
    gc.collect()
    torch.cuda.empty_cache()
    ours = in_process(model, tokenizer, compiled=device.type == "cuda")
    results["figures"]["ours"] = figures(ours, config, repeats, lambda what: progress(f"ours: {what}"))
    velocities["ours"] = ours.velocity(noise, SIDE)
    results["bytes per token"] = bytes_per_token(model)
    save(results)
    sizes = [canvas_of(config, options).tokens for options in WORKS.values()]
    results["scaling"] = scaling(ours, progress, [(rows, latents) for latents in sizes for rows in (2, 1)])
    results["product TFLOP/s"] = product_speed(device, model.dtype)
    results["floors"] = floors(config, tokenizer, results["product TFLOP/s"])
    save(results)
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    progress("float32")
    model = fresh_float32(model)
    exact = in_process(model, tokenizer, compiled=False).velocity(noise, SIDE)
    results["velocity errors"] = {name: relative(v, exact) for name, v in velocities.items()}
    save(results)
    return results


def figures(
    contender: Ours | OfficialLance, config: LanceConfig, repeats: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds, and milliseconds per token, of each work after a warm-up. The official code is asked for what begins with a text
    alone."""
    found: dict[str, list[float]] = {}
    for name, options in WORKS.items():
        progress(name)
        torch.cuda.reset_peak_memory_stats()
        found |= drawing(contender, name, [PROMPT], repeats, **options)
        latents = random_latents(canvas_of(config, options))
        contender.decode(latents)
        found[f"{name}: VAE decode, s"] = [seconds(lambda latents=latents: contender.decode(latents)) for _ in range(3)]
        found[f"{name}: peak memory, GB"] = [torch.cuda.max_memory_allocated() / 1e9]
    if isinstance(contender, Ours):
        shown = picture(SIDE, SIDE)
        name = f"edit {SIDE}x{SIDE}, {EDIT_STEPS} steps"
        progress(name)
        found |= drawing(contender, name, [shown, EDITED], repeats, output="image", num_timesteps=EDIT_STEPS)
        progress("tokens")
        contender.tokens(inputs=[shown, ASKED])
        found["token, ms"] = [t for _ in range(repeats) for t in contender.tokens(inputs=[shown, ASKED])]
    found["held by torch, GB"] = [torch.cuda.max_memory_reserved() / 1e9]
    return found | memory_of_gpus(1)


def words() -> Tokenizer:
    """A tokenizer in which each word of the prompts is a token, as most are of the published one."""
    made = WordTokenizer(models.WordLevel(unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [PROMPT, chat.DRAW_IMAGE, chat.DRAW_VIDEO, chat.EDIT, *chat.ASK.values(), EDITED, ASKED]
    texts.append("system user assistant image video")
    special = ["<unknown>", *SPECIAL]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    with tempfile.TemporaryDirectory() as folder:
        made.save(str(path := Path(folder) / "tokenizer.json"))
        return Tokenizer(path)


def canvas_of(config: LanceConfig, options: Mapping[str, Any]) -> LanceCanvas:
    frames = (options.get("num_frames", 1) - 1) // config.vae.frames + 1
    return LanceCanvas(config, (frames, *(options[side] // config.token_pixels for side in ("height", "width"))))


def random_latents(canvas: LanceCanvas) -> list[np.ndarray]:
    """As the VAE is given them."""
    shape = canvas.tokens, canvas.config.latent_dim
    return canvas.latents(np.random.default_rng(0).standard_normal(shape, np.float32))


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * PRODUCT**3 / min(seconds(lambda: a @ b) for _ in range(10)) / 1e12


def floors(config: LanceConfig, tokenizer: Tokenizer, speed: float) -> dict[str, float]:
    """Seconds that the products and the attention of each work take at a speed in TFLOP/s."""
    found = {}
    for name, options in WORKS.items():
        plan = make_plan(Request([PROMPT], **options), config, tokenizer)
        rows = sum(2 if step.guided else 1 for step in plan.steps)
        found[f"{name}: denoising, s"] = tflop(config, rows, plan.canvas.tokens, CONTEXT) / speed
        found[f"{name}: VAE decode, s"] = decoding_tflop(plan.canvas) / speed
        found[f"{name}: whole, s"] = found[f"{name}: denoising, s"] + found[f"{name}: VAE decode, s"]
    return found


def decoding_tflop(canvas: LanceCanvas) -> float:
    """What the autoencoder's decoder computes, counted where nothing is."""
    with torch.device("meta"):
        vae = WanVAE(canvas.config.vae)
        with FlopCounterMode(display=False) as counted:
            state = None
            for latent in random_latents(canvas):
                _, _, *state = vae.decode(torch.empty(latent.shape), state)
    return counted.get_total_flops() / 1e12
