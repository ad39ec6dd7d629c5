"""Ours at full size on several GPUs, for full_size.py."""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bagel_opt.api import Model
from bagel_opt.bench.contenders import Ours, in_process, random_model
from bagel_opt.bench.measure import SIZES
from bagel_opt.config import BagelConfig
from bagel_opt.loading import shipped_model
from bagel_opt.runtime.starting import load_on_ranks
from bagel_opt.tokenizer import Tokenizer

WAYS = "auto", "guidance", "sequence"
DEVICE = torch.device("cuda", 0)
FEW_SIZES = {"1024x1024": SIZES["1024x1024"]}


def several(
    config: BagelConfig, gpus: int, kinds: Mapping[str, Mapping[str, str]], progress: Callable[[str], None]
) -> Iterator[tuple[str, Ours]]:
    """Models on so many GPUs, one after another, by name: the first kind of weights in each of WAYS, the others in one. kinds:
    by a name, of the parts that are quantised."""
    plain, *_ = kinds
    for kind, parts in kinds.items():
        for way in WAYS if kind == plain else WAYS[:1]:
            name = f"{gpus} GPUs, {way}" + (f", {kind}" if kind != plain else "")
            progress(name)
            given = {"device": DEVICE, "config": config, "kinds": dict(parts), "adapters": {}}
            model = load_on_ranks(random_loaded, given, gpus, way, DEVICE)
            yield name, Ours(model, several=True)
            model.close()
            del model
            gc.collect()
            torch.cuda.empty_cache()


def random_loaded(device: Any, config: BagelConfig, kinds: Mapping[str, str], **_: object) -> Model:
    """What `load` is for a checkpoint: a model with random weights, on a GPU compiled."""
    device, tokenizer = torch.device(device), Tokenizer(shipped_model() / "tokenizer.json")
    return in_process(random_model(config, device, kinds), tokenizer, compiled=device.type == "cuda").model


def gathers(gpus: int, shared: Ours) -> dict[str, list[float]]:
    """Microseconds of what the GPUs exchange: in a layer of two rows of 4,096 latents, and for a token; and the rate."""
    c = shared.model.config.llm
    sizes = {
        "a layer's keys and values": 2 * 2 * 4096 // gpus * 2 * c.num_key_value_heads * c.head_dim,
        "a token's parts": 2 * c.hidden_size,
    }
    found = {}
    for name, size in sizes.items():
        seconds = shared.model.runtime.gather_seconds(size)
        found[f"gathering {name}, us"] = [1e6 * seconds]
        found[f"gathering {name}, GB/s into each"] = [(gpus - 1) * size / seconds / 1e9]
    return found


def memory_of_gpus(gpus: int) -> dict[str, list[float]]:
    """What is taken of each, all told."""
    found = {}
    for number in range(gpus):
        free, total = torch.cuda.mem_get_info(number)
        found[f"memory of GPU {number}, GB"] = [(total - free) / 1e9]
    return found
