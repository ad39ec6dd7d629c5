"""BAGEL at its published sizes with random weights on one GPU: python -m bagel_opt bench --preset h100 [--official DIR]

Ours under torch.compile, the official code, and on request ours from bundles, in one process and one run, on the same
weights: the first two on the same memory.
"""

import dataclasses
import datetime
import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bagel_opt
from bagel_opt.bench.contenders import Ours, in_process, random_model
from bagel_opt.bench.full_size_adapters import adapters
from bagel_opt.bench.full_size_gpus import FEW_SIZES, gathers, memory_of_gpus, several
from bagel_opt.bench.full_size_memory import planned, under_caps
from bagel_opt.bench.full_size_official import Official
from bagel_opt.bench.measure import CONTEXT, evaluation, figures, seconds
from bagel_opt.config import PUBLISHED
from bagel_opt.lance.config import Config
from bagel_opt.loading import shipped_model
from bagel_opt.model.attention import flash_package
from bagel_opt.model.families import build
from bagel_opt.model.mixture import Mixture
from bagel_opt.quantization import kinds_of_parts
from bagel_opt.tokenizer import Tokenizer

# Rows and latent tokens of evaluations of the flow that are timed by themselves.
SCALING = (2, 256), (2, 1024), (2, 2304), (1, 4096), (2, 4096), (4, 4096), (8, 4096), (12, 4096)


def versions() -> dict[str, str | None]:
    """What has a share in the figures, as far as it is installed."""
    found = {"bagel_opt": bagel_opt.__version__, "torch": torch.__version__, "flash": flash_package()}
    for name in ("flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "transformers", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def report() -> dict[str, Any]:
    """Where, when and by what figures are made, and room for them."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "figures": {},
    }


def run_full_size(
    checkout: str | None,
    bundles: dict[str, Path],
    quantization: Sequence[str],
    memory: Sequence[str],
    gpus: int,
    repeats: int,
    progress: Callable[[str], None],
    save: Callable[[dict], None],
) -> dict:
    """All figures, with the card and the versions. save(results) is called when there are more. bundles: by "onnx" or
    "aoti", a folder for such a bundle with random weights, which is left there, or such a bundle. quantization: kinds in
    which ours is timed too. memory: caps, such as "12GB", under which it is timed in 16 bits and in each of these. gpus: on
    how many it is timed besides one. Raises ValueError for another and without so many, and FileNotFoundError where
    `checkout` is none of the official code."""
    kinds = {kind: kinds_of_parts(kind) for kind in quantization}
    precisions = {"16 bits": {}, **kinds}
    plans = planned(PUBLISHED, precisions, memory)
    if bundles:
        from bagel_opt.bench.full_size_bundles import measured, written
    if checkout and not (Path(checkout) / "inferencer.py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of the official code: it has no inferencer.py")
    if not torch.cuda.is_available():
        raise ValueError("the h100 preset needs a CUDA device, and this torch finds none")
    if gpus > torch.cuda.device_count():
        raise ValueError(f"--gpus {gpus}, but this machine has {torch.cuda.device_count()}")
    device = torch.device("cuda")
    tokenizer = Tokenizer(shipped_model() / "tokenizer.json")
    config = dataclasses.replace(PUBLISHED, special=tokenizer.special)
    model = random_model(config, device)
    noise = torch.randn(64 * 64, config.latent_dim, generator=torch.Generator().manual_seed(0))
    results, velocities = report(), {}
    if checkout:
        official = Official(checkout, model, tokenizer)
        results["figures"]["official"] = figures(official, repeats, lambda what: progress(f"official code: {what}"))
        velocities["official"] = official.velocity(noise)
        save(results)
        del official
    gc.collect()
    torch.cuda.empty_cache()
    ours = in_process(model, tokenizer)
    results["figures"]["ours"] = figures(ours, repeats, lambda what: progress(f"ours: {what}"))
    velocities["ours"] = ours.velocity(noise)
    save(results)
    results["scaling"] = scaling(ours, progress, SCALING)
    results["adapters"] = adapters(ours, progress)
    results["bytes per token"] = bytes_per_token(model)
    save(results)
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    exported = {kind: written(model, folder, kind, progress) for kind, folder in bundles.items()}
    progress("float32")
    model = fresh_float32(model)
    exact = in_process(model, tokenizer, compiled=False).velocity(noise)
    results["velocity errors"] = {name: relative(v, exact) for name, v in velocities.items()}
    save(results)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    for kind, folder in bundles.items():
        results["figures"][kind], velocity = measured(folder, kind, repeats, noise, progress)
        results["figures"][kind]["export, s"] = [exported[kind]] if exported[kind] else []
        results["velocity errors"][kind] = relative(velocity, exact)
        save(results)
        gc.collect()
        torch.cuda.empty_cache()
    for kind, parts in kinds.items():
        ours = in_process(random_model(config, device, parts), tokenizer)
        results["figures"][kind] = figures(ours, repeats, lambda what, kind=kind: progress(f"{kind}: {what}"))
        results["velocity errors"][kind] = relative(ours.velocity(noise), exact)
        save(results)
        del ours
        gc.collect()
        torch.cuda.empty_cache()
    for way, shared in several(config, gpus, precisions, progress) if gpus > 1 else ():
        results["figures"][way] = figures(shared, repeats, lambda what, way=way: progress(f"{way}: {what}"), FEW_SIZES)
        results["figures"][way] |= gathers(gpus, shared) | memory_of_gpus(gpus)
        results["velocity errors"][way] = relative(shared.velocity(noise), exact)
        save(results)
    if plans:
        results["memory"] = []
        for row in under_caps(config, tokenizer, precisions, plans, progress):
            results["memory"].append(row)
            save(results)
    return results


def bytes_per_token(model: Mixture) -> int:
    """Of the weights that are read for one."""
    read = ("llm.layers", "llm.lm_head")
    return sum(p.nbytes for name, p in model.named_parameters() if name.startswith(read) and ".gen." not in name)


def relative(v: Tensor, exact: Tensor) -> float:
    return float((v - exact).norm() / exact.norm())


def fresh_float32(model: Mixture) -> Mixture:
    """The same weights in float32, uncompiled; one parameter after another, for want of memory for both."""
    with torch.device("meta"):
        wide = build(model.config)
    for name, narrow in model.named_parameters():
        path, _, last = name.rpartition(".")
        setattr(wide.get_submodule(path), last, torch.nn.Parameter(narrow.data.float().contiguous(), False))
        narrow.data = torch.empty(0)
    return wide.eval()


def scaling(ours: Ours, progress: Callable[[str], None], sizes: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Milliseconds of one evaluation of the flow against rows and latent tokens, with little context."""
    runtime, found = ours.model.runtime, []
    for rows, latents in sizes:
        progress(f"scaling: {rows} rows of {latents} tokens")
        once, caches = evaluation(runtime, rows, latents)
        once()
        times = [1000 * seconds(once) for _ in range(5)]
        work = tflop(ours.model.config, rows, latents, CONTEXT)
        found.append({"rows": rows, "latents": latents, "ms": statistics.median(times), "tflop": work})
        runtime.give_back(caches)
    return found


def tflop(c: Config, rows: int, latents: int, context: int) -> float:
    """What one evaluation must compute at least: the generation expert's products and the attention."""
    q = c.llm.num_attention_heads * c.llm.head_dim
    kv = 2 * c.llm.num_key_value_heads * c.llm.head_dim
    weights = c.llm.hidden_size * (2 * q + kv + 3 * c.llm.intermediate_size)
    attention = 2 * q * (latents + 2 + context)
    return rows * c.llm.num_hidden_layers * 2 * latents * (weights + attention) / 1e12
