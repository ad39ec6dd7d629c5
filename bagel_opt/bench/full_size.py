"""BAGEL at its published sizes with random weights on one GPU: python -m bagel_opt bench --preset h100 [--official DIR]

Ours under torch.compile, the official code, and on request ours from bundles, in one process and one run, on the same
weights: the first two on the same memory.
"""

import datetime
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import bagel_opt
from bagel_opt.api import Model, shipped_model
from bagel_opt.bench.official_full_size import DEFAULTS, PROMPT, TOKENS, Official
from bagel_opt.config import BagelConfig, LLMConfig, ResizeConfig, VAEConfig, ViTConfig
from bagel_opt.model.attention import _flash_package, choose
from bagel_opt.model.bagel import Bagel
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.sampling.job import Job
from bagel_opt.tokenizer import Tokenizer

EDIT = {**DEFAULTS, "cfg_img_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
EDIT_POINTS = 9
PEAK = "peak memory so far, GB"
SIZES = {"1024x1024": (1024, 1024), "768x1024": (1024, 768), "512x512": (512, 512)}  # names are width x height


def published(tokenizer: Tokenizer) -> BagelConfig:
    """BAGEL-7B-MoT."""
    return BagelConfig(
        llm=LLMConfig(3584, 18944, 28, 28, 4, 152064),
        vit=ViTConfig(1152, 4304, 26, 16, 14, 70**2),
        vae=VAEConfig(),
        vae_resize=ResizeConfig(1024, 512, 16),
        vit_resize=ResizeConfig(980, 224, 14),
        special=tokenizer.special,
        latent_side=64,
        vit_side=70,
    )


def random_model(config: BagelConfig, device: torch.device) -> Bagel:
    """Random weights in bfloat16, made where they stay."""
    with torch.device("meta"):
        model = Bagel(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p.fill_(1.0)
        else:
            p.normal_(0, 0.02, generator=generator)
    return model


def picture(height: int, width: int) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), 30).convert("RGB")


class Ours:
    """The model under torch.compile."""

    def __init__(self, model: Bagel, tokenizer: Tokenizer, dtype: torch.dtype = torch.bfloat16, compiled: bool = True):
        device = model.latent_in.weight.device
        model.set_backend(choose("auto", device, dtype))
        runtime = TorchRuntime(model, device, dtype, compiled)
        self.model = Model(runtime, model.config, tokenizer, round_up=True)
        self.drawn: list[float] = []  # seconds of denoising, of each picture

    def draw(self, inputs: list, count: int = 1, **options: object) -> list[Image.Image]:
        self.drawn.clear()
        requests = [bagel_opt.Request(inputs, seed=i, **options) for i in range(count)]
        with timed_draw(self.drawn):
            return [outputs[-1] for outputs in self.model.run_many(requests)]

    def tokens(self, rows: int = 1) -> list[float]:
        """Milliseconds per token."""
        seen: list[float] = []
        answer = {"output": "text", "do_sample": True, "text_temperature": 1000.0, "max_think_tokens": TOKENS + 2}
        requests = [bagel_opt.Request(PROMPT, seed=i, **answer) for i in range(rows)]
        requests[0] = bagel_opt.Request(PROMPT, seed=0, on_token=lambda _: seen.append(time.perf_counter()), **answer)
        self.model.run_many(requests)
        return [1000 * (b - a) for a, b in itertools.pairwise(seen)][1:]

    def decode_picture(self) -> None:
        runtime = self.model.runtime
        runtime.host(runtime.run("vae_decode", [torch.randn(1, 16, 128, 128, device=runtime.device)])[0])

    def velocity(self, noise: Tensor) -> Tensor:
        """The first guided velocity of a picture that starts at this noise."""
        seen: list[Tensor] = []
        shape = {"height": 1024, "width": 1024, "num_timesteps": 2, "noise": noise}
        self.model.generate(PROMPT, on_step=lambda event: seen.append(event.v_t), **shape)
        return seen[0].double()


@contextmanager
def timed_draw(seconds: list[float]) -> Iterator[None]:
    """Appends how long each request denoised, from its filled contexts to its final latents."""
    original = Job._draw

    def draw(job: Job) -> Iterator:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        latents = yield from original(job)
        seconds.append(time.perf_counter() - begun)  # the latents are on the host
        return latents

    Job._draw = draw
    try:
        yield
    finally:
        Job._draw = original


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def figures(contender: Ours | Official, repeats: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds, and milliseconds per step or token, of each work after a warm-up."""
    found: dict[str, list[float]] = {}

    def draws(name: str, inputs: list, count: int = 1, repeats: int = repeats, **options: Any) -> None:
        progress(name)
        short = {**options, "num_timesteps": 8}  # reaches the times without guidance, too
        begun = time.perf_counter()
        contender.draw(inputs, count, **short)
        found[f"{name}: first call, s"] = [time.perf_counter() - begun]
        contender.draw(inputs, count, **short)  # what ran once in the first call may be captured in the second
        for _ in range(repeats):
            whole = seconds(lambda: contender.draw(inputs, count, **options))
            found.setdefault(f"{name}: denoising, s", []).append(max(contender.drawn))
            found.setdefault(f"{name}: whole, s", []).append(whole)

    torch.cuda.reset_peak_memory_stats()
    for name, (height, width) in SIZES.items():
        draws(name, [PROMPT], height=height, width=width, **DEFAULTS)
    draws("edit 1024x1024, 8 steps", [picture(1024, 1024), "make it red"], **{**EDIT, "num_timesteps": EDIT_POINTS})
    progress("tokens")
    contender.tokens()
    found["token, ms"] = [t for _ in range(repeats) for t in contender.tokens()]
    contender.decode_picture()
    found["VAE decode 1024x1024, s"] = [seconds(contender.decode_picture) for _ in range(5)]
    found[PEAK] = [torch.cuda.max_memory_allocated() / 1e9]
    found["and held by torch, GB"] = [torch.cuda.max_memory_reserved() / 1e9]
    if type(contender) is Ours:  # the official code draws and writes for one request at a time, the bundle for one row
        contender.tokens(8)
        found["token of 8 rows, ms"] = contender.tokens(8)
        draws("4 pictures 1024x1024", [PROMPT], 4, 1, height=1024, width=1024, **DEFAULTS)
    return found


def versions() -> dict[str, str | None]:
    """What has a share in the figures, as far as it is installed."""
    found = {"bagel_opt": bagel_opt.__version__, "torch": torch.__version__, "flash": _flash_package()}
    for name in ("flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "transformers", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def run_full_size(
    checkout: str | None,
    bundles: dict[str, Path],
    repeats: int,
    progress: Callable[[str], None],
    save: Callable[[dict], None],
) -> dict:
    """All figures, with the card and the versions. save(results) is called when there are more. bundles: by "onnx" or
    "aoti", a folder for such a bundle with random weights, which is left there, or such a bundle. Raises ValueError
    without a CUDA device, and FileNotFoundError where `checkout` is none of the official code."""
    if bundles:
        from bagel_opt.bench.bundles_full_size import from_bundle, written
    if checkout and not (Path(checkout) / "inferencer.py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of the official code: it has no inferencer.py")
    if not torch.cuda.is_available():
        raise ValueError("the h100 preset needs a CUDA device, and this torch finds none")
    device = torch.device("cuda")
    tokenizer = Tokenizer(shipped_model() / "tokenizer.json")
    config = published(tokenizer)
    model = random_model(config, device)
    noise = torch.randn(64 * 64, config.latent_dim, generator=torch.Generator().manual_seed(0))
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "figures": {},
    }
    velocities = {}
    if checkout:
        official = Official(checkout, model, tokenizer)
        results["figures"]["official"] = figures(official, repeats, lambda what: progress(f"official code: {what}"))
        velocities["official"] = official.velocity(noise)
        save(results)
        del official
    gc.collect()
    torch.cuda.empty_cache()
    ours = Ours(model, tokenizer)
    results["figures"]["ours"] = figures(ours, repeats, lambda what: progress(f"ours: {what}"))
    velocities["ours"] = ours.velocity(noise)
    save(results)
    results["scaling"] = scaling(ours, progress)
    results["bytes per token"] = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if name.startswith(("llm.layers", "llm.lm_head")) and ".gen." not in name
    )
    save(results)
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    exported = {kind: written(model, folder, kind, progress) for kind, folder in bundles.items()}
    progress("float32")
    model = fresh_float32(model)
    exact = Ours(model, tokenizer, torch.float32, compiled=False).velocity(noise)
    results["velocity errors"] = {name: relative(v, exact) for name, v in velocities.items()}
    save(results)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    for kind, folder in bundles.items():
        results["figures"][kind], velocity = from_bundle(folder, kind, repeats, noise, progress)
        results["figures"][kind]["export, s"] = [exported[kind]] if exported[kind] else []
        results["velocity errors"][kind] = relative(velocity, exact)
        save(results)
        gc.collect()
        torch.cuda.empty_cache()
    return results


def relative(v: Tensor, exact: Tensor) -> float:
    return float((v - exact).norm() / exact.norm())


def fresh_float32(model: Bagel) -> Bagel:
    """The same weights in float32, uncompiled; one parameter after another, for want of memory for both."""
    with torch.device("meta"):
        wide = Bagel(model.config)
    for name, narrow in model.named_parameters():
        path, _, last = name.rpartition(".")
        setattr(wide.get_submodule(path), last, torch.nn.Parameter(narrow.data.float().contiguous(), False))
        narrow.data = torch.empty(0)
    return wide.eval()


def scaling(ours: Ours, progress: Callable[[str], None]) -> list[dict[str, float]]:
    """Milliseconds of one evaluation of the flow against rows and latent tokens, with 128 slots of context."""
    runtime, c, found = ours.model.runtime, ours.model.config, []
    for rows, latents in ((2, 256), (2, 1024), (2, 2304), (1, 4096), (2, 4096), (4, 4096), (8, 4096), (12, 4096)):
        progress(f"scaling: {rows} rows of {latents} tokens")
        caches = runtime.caches(rows, -(-(latents + 130) // 256) * 256)
        shape = rows, latents, c.latent_dim
        counts = [torch.full((rows,), n, device=runtime.device) for n in (0, latents, 128)]
        index = torch.arange(latents, device=runtime.device).expand(rows, -1)
        inputs = [torch.randn(shape, device=runtime.device), torch.ones(rows, device=runtime.device), index, *counts]
        once = functools.partial(runtime.run, "generate", inputs, caches)
        once()
        times = [1000 * seconds(once) for _ in range(5)]
        found.append(
            {"rows": rows, "latents": latents, "ms": statistics.median(times), "tflop": tflop(c, rows, latents, 128)}
        )
        runtime.give_back(caches)
    return found


def tflop(c: BagelConfig, rows: int, latents: int, context: int) -> float:
    """What one evaluation must compute at least: the generation expert's products and the attention."""
    q = c.llm.num_attention_heads * c.llm.head_dim
    kv = 2 * c.llm.num_key_value_heads * c.llm.head_dim
    weights = c.llm.hidden_size * (2 * q + kv + 3 * c.llm.intermediate_size)
    attention = 2 * q * (latents + 2 + context)
    return rows * c.llm.num_hidden_layers * 2 * latents * (weights + attention) / 1e12
