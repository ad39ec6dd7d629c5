"""BAGEL's published sizes from bundles on the GPU, for full_size.py."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bagel_opt.bench.contenders import from_bundle
from bagel_opt.bench.measure import PEAK, figures
from bagel_opt.export.bundle import write_bundle
from bagel_opt.export.onnx import Shapes
from bagel_opt.export.placing import put_in_place
from bagel_opt.files.manifest import MANIFEST, TOKENIZER
from bagel_opt.loading import shipped_model
from bagel_opt.model.attention import choose
from bagel_opt.model.bagel import Bagel
from bagel_opt.model.ops import TorchOps
from bagel_opt.profile import Profile, load_profile

PROFILES = ("bagel-512", "bagel-1024", "bagel-edit-1024")


def written(model: Bagel, folder: Path, kind: str, progress: Callable[[str], None]) -> float | None:
    """The seconds that it took to write a bundle, "onnx" or "aoti", of a model that is in no checkpoint, or None where one
    lies in the folder."""
    if (folder / MANIFEST).is_file():
        return None
    begun = time.perf_counter()
    profiles = sorted(map(load_profile, PROFILES), key=Profile.cost)

    def make() -> Bagel | Shapes:
        return Shapes(model.config, model.dtype, "cuda") if kind == "onnx" else plain(model)

    with put_in_place(folder.resolve()) as partial:
        shutil.copyfile(shipped_model() / TOKENIZER, partial / TOKENIZER)
        write_bundle(
            make,
            partial,
            kind,
            "cuda",
            profiles,
            lambda what, *_: progress(f"{kind}: {what}"),
            model.named_parameters(),
        )
    return time.perf_counter() - begun


def plain(model: Bagel) -> Bagel:
    """A model without what compiling did to it, with the same weights."""
    with torch.device("meta"):
        other = Bagel(model.config)
    other.load_state_dict({name: p.detach().contiguous() for name, p in model.named_parameters()}, assign=True)
    other.ops = TorchOps(choose("auto", model.device, model.dtype))
    return other.eval().requires_grad_(False)


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The bytes that this process has on the GPU beyond what it had before and what torch holds: at most, and in the end."""

    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    before, found, done = used(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found[0] = max(found[0], used() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[1] = used() - before


def measured(
    folder: Path, kind: str, repeats: int, noise: Tensor, progress: Callable[[str], None]
) -> tuple[dict[str, list[float]], Tensor]:
    """Figures and a velocity of a bundle, which has the GPU for itself."""
    with watched_memory() as memory:
        progress(f"{kind}: loading")
        begun = time.perf_counter()
        bundle = from_bundle(folder)
        loading = time.perf_counter() - begun
        found = figures(bundle, repeats, lambda what: progress(f"{kind}: {what}"))
    velocity = bundle.velocity(noise)
    if kind == "onnx":  # its memory is not torch's
        del found["and held by torch, GB"]
        found[PEAK] = [memory[0] / 1e9]
        found["held in the end, GB"] = [memory[1] / 1e9]
    found["load, s"] = [loading]
    return found, velocity
