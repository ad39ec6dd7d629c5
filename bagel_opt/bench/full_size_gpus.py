"""Ours at full size on several GPUs, for full_size.py."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bagel_opt.api import Model
from bagel_opt.bench.contenders import Ours, in_process, random_model
from bagel_opt.bench.measure import SIZES
from bagel_opt.config import PUBLISHED
from bagel_opt.loading import shipped_model
from bagel_opt.runtime.mirrored import load_on_ranks
from bagel_opt.tokenizer import Tokenizer

WAYS = "auto", "guidance", "sequence"
FEW_SIZES = {name: SIZES[name] for name in ("1024x1024",)}


def several(
    gpus: int, kinds: Mapping[str, Mapping[str, str]], progress: Callable[[str], None]
) -> Iterator[tuple[str, Ours]]:
    """Models on so many GPUs, one after another, by name: the first kind of weights in each of WAYS, the others in one. kinds:
    by a name, of the parts that are quantised."""
    device, (plain, *_) = torch.device("cuda", 0), kinds
    for kind, parts in kinds.items():
        for way in WAYS if kind == plain else WAYS[:1]:
            name = f"{gpus} GPUs, {way}" + (f", {kind}" if kind != plain else "")
            progress(name)
            given = {"device": device, "kinds": dict(parts), "adapters": {}}
            model = load_on_ranks(random_loaded, given, gpus, way, device)
            yield name, Ours(model, several=True)
            model.close()
            del model
            gc.collect()
            torch.cuda.empty_cache()


def random_loaded(device: Any, kinds: Mapping[str, str], **_: object) -> Model:
    """What `load` is for a checkpoint: a compiled model of the published sizes with random weights."""
    device = torch.device(device)
    tokenizer = Tokenizer(shipped_model() / "tokenizer.json")
    config = dataclasses.replace(PUBLISHED, special=tokenizer.special)
    return in_process(random_model(config, device, kinds), tokenizer).model


def memory_of_gpus(gpus: int) -> dict[str, list[float]]:
    """What is taken of each, all told."""
    found = {}
    for number in range(gpus):
        free, total = torch.cuda.mem_get_info(number)
        found[f"memory of GPU {number}, GB"] = [(total - free) / 1e9]
    return found
