"""What caps of the GPU's memory cost at full size, for full_size.py: steps, tokens and pictures under `memory=`, beside no cap."""

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bagel_opt.api import Model
from bagel_opt.bench.contenders import Ours, random_model
from bagel_opt.bench.full_size_official import DEFAULTS, PROMPT
from bagel_opt.bench.measure import evaluation, seconds
from bagel_opt.config import BagelConfig
from bagel_opt.model.attention import choose
from bagel_opt.model.ops import TorchOps
from bagel_opt.profile import Profile, load_profile
from bagel_opt.runtime.memory_plan import RESERVE, MemoryPlan, make_plan
from bagel_opt.runtime.streaming import page_locked
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.tokenizer import Tokenizer

PROFILE = "bagel-1024"
ROWS, LATENTS, SIDE = 2, 4096, 1024
STEPS = 10  # launched one after another, as in a picture
TIMEPOINTS = 11  # of the picture
LINK_BYTES = 2**29
DEVICE = torch.device("cuda")

Figures = dict[str, float | str | bool]
Kinds = Mapping[str, Mapping[str, str]]


def planned(config: BagelConfig, kinds: Kinds, caps: Sequence[str]) -> dict[tuple[str, str], MemoryPlan]:
    """The plan of each kind of weights under each cap. Raises ValueError where there is none, before anything is made."""
    profile = load_profile(PROFILE)
    return {
        (name, cap): make_plan(config, cap, profile, "bfloat16", parts, RESERVE)
        for name, parts in kinds.items()
        for cap in caps
    }


def under_caps(
    config: BagelConfig,
    tokenizer: Tokenizer,
    kinds: Kinds,
    plans: Mapping[tuple[str, str], MemoryPlan],
    progress: Callable[[str], None],
) -> list[Figures]:
    """kinds: by a name, of the parts that are quantised. plans: as `planned` makes them. -> figures of each kind without a cap
    and under each"""
    profile, speed, found = load_profile(PROFILE), link_speed(), []
    for name, parts in kinds.items():
        progress(f"{name} without a cap")
        without, picture = _measured(config, tokenizer, profile, parts, None)
        found.append({"weights": name, "cap": "none", **without})
        for (mine, cap), plan in plans.items():
            if mine != name:
                continue
            progress(f"{name} under {cap}")
            with _capped(plan.memory):
                figures, same = _measured(config, tokenizer, profile, parts, plan)
            found.append(
                {
                    "weights": name,
                    "cap": cap,
                    **figures,
                    "step, times no cap": figures["step, ms"] / without["step, ms"],
                    "link's floor of a step, ms": plan.step_bytes / speed / 1e6,
                    "link's floor of a token, ms": plan.token_bytes / speed / 1e6,
                    "same picture": bool(np.array_equal(picture, same)),
                }
            )
    return found


def link_speed() -> float:
    """GB/s of copies from page-locked memory."""
    host, there = page_locked(LINK_BYTES, DEVICE), torch.empty(LINK_BYTES, dtype=torch.uint8, device=DEVICE)
    return LINK_BYTES / min(seconds(lambda: there.copy_(host, non_blocking=True)) for _ in range(5)) / 1e9


def _measured(
    config: BagelConfig, tokenizer: Tokenizer, profile: Profile, kinds: Mapping[str, str], plan: MemoryPlan | None
) -> tuple[Figures, np.ndarray]:
    """Figures, and the picture."""
    _forget()
    model = random_model(config, DEVICE, kinds, plan.on_host if plan else lambda name: False)
    model.ops = TorchOps(choose("auto", DEVICE, model.dtype))
    runtime = TorchRuntime(prepare(model, compiled=True, plan=plan))
    once, caches = evaluation(runtime, ROWS, LATENTS)
    for _ in range(3):  # compiled, captured, and the first weights there
        once()
    step = 1000 * statistics.median(seconds(lambda: _repeated(once)) / STEPS for _ in range(3))
    runtime.give_back(caches)
    ours = Ours(Model(runtime, config, tokenizer, [profile], round_up=True), several=False)
    options = {**DEFAULTS, "height": SIDE, "width": SIDE, "num_timesteps": TIMEPOINTS}
    ours.draw([PROMPT], **options)
    picture = np.asarray(ours.draw([PROMPT], **options)[0])
    ours.tokens()
    return {
        "step, ms": step,
        f"denoising in {TIMEPOINTS - 1} steps, s": ours.drawn[-1],
        "token, ms": statistics.median(ours.tokens()),
        "tensors at most, GB": torch.cuda.max_memory_allocated() / 1e9,
        "weights on the host, GB": plan.host / 1e9 if plan else 0.0,
    }, picture


def _repeated(call: Callable[[], tuple[Tensor, ...]]) -> None:
    for _ in range(STEPS):
        call()


@contextlib.contextmanager
def _capped(memory: int) -> Iterator[None]:
    """torch gets so many bytes, less what CUDA takes outside of it."""
    _forget()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((memory - outside) / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
