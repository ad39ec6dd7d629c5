"""BAGEL's published sizes from bundles on the GPU, for full_size.py."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bagel_opt.api import shipped_model
from bagel_opt.bench.full_size import PEAK, Ours, figures
from bagel_opt.bundle import MANIFEST, TOKENIZER, UNFINISHED, WEIGHTS, Manifest, list_files, load_bundle, machine
from bagel_opt.export import _write_programs
from bagel_opt.export.onnx import Shapes
from bagel_opt.export.packaged import compile_all
from bagel_opt.export.weights import write_parameters
from bagel_opt.model.attention import choose
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import load_profile

PROFILES = ("bagel-512", "bagel-1024", "bagel-edit-1024")


def written(model: Bagel, folder: Path, kind: str, progress: Callable[[str], None]) -> float | None:
    """The seconds that it took to write a bundle of a model, or None where one lies in the folder."""
    if (folder / MANIFEST).is_file():
        return None
    begun = time.perf_counter()
    write_bundle(model, folder, kind, lambda what, *_: progress(f"{kind}: {what}"))
    return time.perf_counter() - begun


def write_bundle(model: Bagel, folder: Path, kind: str, progress: Callable[..., None]) -> None:
    """A bundle, "onnx" or "aoti", of a model that is in no checkpoint: what `export` writes, with its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype, device = model.latent_in.weight.dtype, model.latent_in.weight.device
    profiles = sorted(map(load_profile, PROFILES), key=lambda profile: profile.cost())
    progress("writing weights")
    if kind == "onnx":
        source = Shapes(model.config, dtype, "cuda")
        source.write_weights(folder, model.named_parameters())
        attention = source.model.llm.backend
    else:
        attention = choose("auto", device, dtype)
        source = plain(model)
        source.set_backend(attention)
        write_parameters(folder / WEIGHTS, source)
    programs = _write_programs(source, profiles, folder, kind, progress)
    if kind == "aoti":
        compile_all(folder, progress)
    shutil.copyfile(shipped_model() / "tokenizer.json", folder / TOKENIZER)
    manifest = Manifest(
        kind=kind,
        dtype=str(dtype).removeprefix("torch."),
        device="cuda",
        attention=attention,
        profiles=profiles,
        config=model.config,
        programs=programs,
        versions={"torch": torch.__version__},
        machine=machine(device) if kind == "aoti" else "",
        files={},
    )
    progress("sha256")
    dataclasses.replace(manifest, files=list_files(folder)).write(folder)
    (folder / UNFINISHED).rename(folder / MANIFEST)


def plain(model: Bagel) -> Bagel:
    """A model without what compiling did to it, with the same weights."""
    with torch.device("meta"):
        other = Bagel(model.config)
    other.load_state_dict({name: p.detach().contiguous() for name, p in model.named_parameters()}, assign=True)
    return other.eval().requires_grad_(False)


class Loaded(Ours):
    """The model from a bundle."""

    def __init__(self, folder: Path):
        begun = time.perf_counter()
        self.model = load_bundle(folder, check=False)
        self.load_s = time.perf_counter() - begun
        self.drawn: list[float] = []

    def decode_picture(self) -> None:
        runtime = self.model.runtime
        runtime.host(runtime.run("vae_decode", [torch.randn(1, 16, 128, 128).numpy()])[0])


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


def from_bundle(
    folder: Path, kind: str, repeats: int, noise: Tensor, progress: Callable[[str], None]
) -> tuple[dict[str, list[float]], Tensor]:
    """Figures and a velocity of a bundle, which has the GPU for itself."""
    with watched_memory() as memory:
        progress(f"{kind}: loading")
        bundle = Loaded(folder)
        found = figures(bundle, repeats, lambda what: progress(f"{kind}: {what}"))
    velocity = bundle.velocity(noise)
    if kind == "onnx":  # its memory is not torch's
        del found["and held by torch, GB"]
        found[PEAK] = [memory[0] / 1e9]
        found["held in the end, GB"] = [memory[1] / 1e9]
    found["load, s"] = [bundle.load_s]
    return found, velocity
