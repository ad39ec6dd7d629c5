"""What caps of the GPU's memory cost at full size, for full_size.py: steps, tokens, pictures and edits under `memory=`, beside
no cap."""

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel_opt.api import Model
from bagel_opt.bench.contenders import Ours, random_model
from bagel_opt.bench.full_size_official import DEFAULTS, PROMPT
from bagel_opt.bench.measure import EDIT, EDIT_POINTS, evaluation, picture, seconds
from bagel_opt.config import BagelConfig
from bagel_opt.model.attention import choose
from bagel_opt.model.ops import TorchOps
from bagel_opt.profile import load_profile
from bagel_opt.runtime.memory_plan import RESERVE, MemoryPlan, make_plan
from bagel_opt.runtime.streaming import page_locked
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.tokenizer import Tokenizer

DRAW, EDITS = "bagel-1024", "bagel-edit-1024"  # profiles
ROWS, LATENTS, SIDE = 2, 4096, 1024
STEPS = 10  # launched one after another, as in a picture
TIMEPOINTS = 11  # of the picture
LINK_BYTES = 2**29
DEVICE = torch.device("cuda")

Figures = dict[str, float | str | bool]
Kinds = Mapping[str, Mapping[str, str]]
Plans = Mapping[tuple[str, str], Mapping[str, MemoryPlan]]


def planned(config: BagelConfig, kinds: Kinds, caps: Sequence[str]) -> Plans:
    """The plans of each kind of weights under each cap, by profile. Raises ValueError where there is none for a picture, before
    anything is made; for an edit there need be none."""
    found: dict[tuple[str, str], dict[str, MemoryPlan]] = {}
    for name, parts in kinds.items():
        for cap in caps:
            plans = found[name, cap] = {}
            for profile in (DRAW, EDITS):
                with contextlib.suppress(ValueError) if plans else contextlib.nullcontext():
                    plans[profile] = make_plan(config, cap, load_profile(profile), "bfloat16", parts, RESERVE)
    return found


def under_caps(
    config: BagelConfig,
    tokenizer: Tokenizer,
    kinds: Kinds,
    plans: Plans,
    progress: Callable[[str], None],
) -> Iterator[Figures]:
    """kinds: by a name, of the parts that are quantised. plans: as `planned` makes them. -> figures of each kind without a cap
    and under each"""
    speed = link_speed()
    for name, parts in kinds.items():
        progress(f"{name} without a cap")
        without, drawn = _drawing(config, tokenizer, parts, None)
        edit, edited = _editing(config, tokenizer, parts, None)
        yield {"weights": name, "cap": "none", **without, **edit}
        for (mine, cap), by_profile in plans.items():
            if mine != name:
                continue
            progress(f"{name} under {cap}")
            plan = by_profile[DRAW]
            with _capped(plan.memory):
                figures, same = _drawing(config, tokenizer, parts, plan)
                equal = np.array_equal(drawn, same)
                if EDITS in by_profile:
                    edit, same = _editing(config, tokenizer, parts, by_profile[EDITS])
                    figures |= edit
                    equal = equal and np.array_equal(edited, same)
            yield {
                "weights": name,
                "cap": cap,
                **figures,
                "step, times no cap": figures["step, ms"] / without["step, ms"],
                "link's floor of a step, ms": plan.step_bytes / speed / 1e6,
                "link's floor of a token, ms": plan.token_bytes / speed / 1e6,
                "same pictures": bool(equal),
            }


def link_speed() -> float:
    """GB/s of copies from page-locked memory."""
    host, there = page_locked(LINK_BYTES, DEVICE), torch.empty(LINK_BYTES, dtype=torch.uint8, device=DEVICE)
    return LINK_BYTES / min(seconds(lambda: there.copy_(host, non_blocking=True)) for _ in range(5)) / 1e9


def _loaded(
    config: BagelConfig, tokenizer: Tokenizer, profile: str, kinds: Mapping[str, str], plan: MemoryPlan | None
) -> Ours:
    _forget()
    model = random_model(config, DEVICE, kinds, plan.on_host if plan else lambda name: False)
    model.ops = TorchOps(choose("auto", DEVICE, model.dtype))
    runtime = TorchRuntime(prepare(model, compiled=True, plan=plan))
    return Ours(Model(runtime, config, tokenizer, [load_profile(profile)], round_up=True), several=False)


def _drawing(
    config: BagelConfig, tokenizer: Tokenizer, kinds: Mapping[str, str], plan: MemoryPlan | None
) -> tuple[Figures, np.ndarray]:
    """Figures of steps, a picture and tokens, and the picture."""
    ours = _loaded(config, tokenizer, DRAW, kinds, plan)
    runtime = ours.model.runtime
    once, caches = evaluation(runtime, ROWS, LATENTS)
    for _ in range(3):  # compiled, captured, and the first weights there
        once()
    step = 1000 * statistics.median(seconds(lambda: _repeated(once)) / STEPS for _ in range(3))
    runtime.give_back(caches)
    options = {**DEFAULTS, "height": SIDE, "width": SIDE, "num_timesteps": TIMEPOINTS}
    ours.draw([PROMPT], **options)
    drawn = np.asarray(ours.draw([PROMPT], **options)[0])
    ours.tokens()
    return {
        "step, ms": step,
        f"denoising in {TIMEPOINTS - 1} steps, s": ours.drawn[-1],
        "token, ms": statistics.median(ours.tokens()),
        "tensors at most, GB": torch.cuda.max_memory_allocated() / 1e9,
        "weights on the host, GB": plan.host / 1e9 if plan else 0.0,
    }, drawn


def _editing(
    config: BagelConfig, tokenizer: Tokenizer, kinds: Mapping[str, str], plan: MemoryPlan | None
) -> tuple[Figures, np.ndarray]:
    """Figures of an edit in three branches, and its picture."""
    ours = _loaded(config, tokenizer, EDITS, kinds, plan)
    options = {**EDIT, "num_timesteps": EDIT_POINTS}
    inputs = [picture(SIDE, SIDE), "make it red"]
    ours.draw(inputs, **options)
    pictures: list[Image.Image] = []
    whole = seconds(lambda: pictures.extend(ours.draw(inputs, **options)))
    return {
        f"edit, {EDIT_POINTS - 1} steps, s": ours.drawn[-1],
        "edit, whole, s": whole,
        "edit, tensors at most, GB": torch.cuda.max_memory_allocated() / 1e9,
    }, np.asarray(pictures[-1])


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
