"""The runtime of torch.export archives and AOTInductor packages. One copy of the weights serves all parts."""

import copy
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

from bagel_opt.errors import BundleError, reason
from bagel_opt.files.manifest import CACHE, WEIGHTS, Manifest
from bagel_opt.files.torch_weights import read_weights
from bagel_opt.model.families import build
from bagel_opt.model.ops import TorchOps
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import slots_in_use
from bagel_opt.quantization import kinds_of_products
from bagel_opt.runtime.active import torch_active
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare, register_kernels

LEVELS = ("DEFAULT", "AVX2", "AVX512")  # what torch tells apart on x86, each with all before it
# Features that no compiler takes on its own, so that code which was compiled where they are does without.
UNUSED = {"aes", "clflush", "clflushopt", "clwb", "fma4", "sha", "sse4a"}


def open_package(path: Path | str, device: torch.device) -> Any:
    """What torch._inductor.aoti_load_package wraps: that one wants a C++ compiler and takes 8 s.

    On a GPU one thread at a time runs programs, and what keeps threads apart could not be captured in CUDA graphs.
    """
    cuda = device.type == "cuda"
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", cuda, 1, device.index or 0 if cuda else -1)


class PackagedRuntime(TorchRuntime):
    """Runs a bundle's programs. A part is loaded when it is first needed."""

    adapters = None

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device):
        self.folder, self.manifest, self.config = folder, manifest, manifest.config
        self.device, self.dtype = device, getattr(torch, manifest.dtype)
        self.weights = read_weights(folder / WEIGHTS, device)
        _join_cache(folder)
        if kinds_of_products(manifest.quantization):
            register_kernels(device)
        self.lock, self.opened, self.made = threading.Lock(), {}, {}
        # compiled code expects caches in plain memory order; the mask is cut instead
        self.fixed_slots, self.spare_slots = True, 0
        self.free_rows = self.free_sizes = manifest.free_sizes
        self.free_texts = False
        self._replay(device.type == "cuda")
        self.programs: Any = self
        self.profile = manifest.profiles[0].name

    def for_profile(self, profile: Profile) -> "PackagedRuntime":
        other = copy.copy(self)
        other.programs, other.profile = other, profile.name
        return other

    def active(self) -> dict[str, str]:
        m = self.manifest
        return torch_active(m.kind, self.device, self.dtype, m.attention, m.quantization)

    def __getitem__(self, name: str) -> Callable:
        """A program as `TorchRuntime.run` calls it."""
        with self.lock:
            if (self.profile, name) not in self.made:
                self.made[self.profile, name] = self._make(self.manifest.programs[self.profile][name])
            return self.made[self.profile, name]

    def _make(self, entry: dict) -> Callable:
        parts = {role: self._open(part["file"]) for role, part in entry["parts"].items()}
        named = {role: part["weights"] for role, part in entry["parts"].items()}
        kinds = [kind for _, kind in entry["inputs"].values()]

        def typed(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """Compiled code does not ask what it gets: dtypes, and plain memory order
            (findings/torch-aoti-reads-slices-as-whole.sh)."""
            typed = (x.to(self.dtype) if k == "model" else x for x, k in zip(inputs, kinds, strict=True))
            return tuple(x.contiguous() for x in typed)

        if "whole" in parts:
            weights = self._weights(named["whole"])
            return lambda *inputs: parts["whole"](typed(inputs), weights)
        layers = []
        while named["layer"][0].format(len(layers)) in self.weights:
            layers.append(self._weights(named["layer"], len(layers)))
        start_weights, end_weights = self._weights(named["start"]), self._weights(named["end"])
        start, layer, end, count = parts["start"], parts["layer"], parts["end"], len(entry["inputs"])

        def run(*tensors: Tensor) -> tuple:
            inputs, caches = typed(tensors[:count]), tensors[count:]
            looked_at = ()
            if caches:
                slots = caches[0].shape[1]
                # a GPU would have to wait for the lengths
                used = slots_in_use(inputs, inputs[-1], slots) if self.device.type == "cpu" else slots
                looked_at = (torch.empty(used, dtype=torch.uint8, device=self.device),) if self.free_sizes else ()
            started = start((*inputs, *looked_at), start_weights)
            shared = 3 if caches else 1
            state, shared = started[:-shared], started[-shared:]
            if caches and not self.free_sizes and self.device.type == "cpu":
                shared = *shared[:-1], shared[-1][..., :used].contiguous()
            for number, weights in enumerate(layers):
                mine = (caches[number], caches[len(layers) + number], inputs[-1]) if caches else ()
                state = layer((*state, *shared, *mine), weights)
            return *end((*state, *inputs), end_weights), *caches

        return run

    def _weights(self, names: Sequence[str], layer: int = 0) -> tuple[Tensor, ...]:
        return tuple(self.weights[name.format(layer)] for name in names)

    def _open(self, file: str) -> Callable[[tuple, tuple], tuple]:
        """(inputs, weights) -> outputs"""
        if file not in self.opened:
            path = self.folder / file
            try:
                if self.manifest.kind == "aoti":
                    loader = open_package(path, self.device)
                    self.opened[file] = lambda inputs, weights: tuple(loader.run([*inputs, *weights]))
                else:
                    self.opened[file] = _flat(torch.export.load(path))
            except Exception as error:  # torch's own have no common base
                raise BundleError(f"{path}: torch {torch.__version__} cannot load it: {reason(error)}") from None
        return self.opened[file]


def _flat(program: torch.export.ExportedProgram) -> Callable[[tuple, tuple], tuple]:
    """An archive's graph, called with its tensors as they are. Taking nested arguments apart and checking their shapes
    anew, which its own module does, takes 0.4 ms a call, as much as a small layer."""
    module = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return lambda inputs, weights: tuple(module.forward(*inputs, *weights))


def machine(device: torch.device) -> str:
    """What code that is compiled here may need, as words: the compiler takes all that it finds (-march=native)."""
    found, named = _features(), torch.backends.cpu.get_cpu_capability()
    if named not in LEVELS:  # such as SVE256, whose length is compiled in
        found.add(named)
    if device.type == "cuda":
        found.add("sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    return " ".join(sorted(found))


def lacking(needed: str, device: torch.device) -> list[str]:
    """What of a bundle's `machine` this one has not. Bundles of format 6 name one of the LEVELS, joined by "and" with a
    GPU's."""
    named = torch.backends.cpu.get_cpu_capability()
    levels = LEVELS[: LEVELS.index(named) + 1] if named in LEVELS else ()
    return sorted({*needed.split()} - {"and", named, *levels, *machine(device).split()})


def _features() -> set[str]:
    try:
        told = torch.cpu.get_capabilities()
    except AttributeError:  # older torch
        return {torch.backends.cpu.get_cpu_capability()}
    return {name for name, there in told.items() if there is True and name not in UNUSED} | {told["architecture"]}


def compiled_runtime(folder: Path, manifest: Manifest, device: torch.device, compiled: bool) -> TorchRuntime:
    """The model under torch.compile, or eager where nothing compiles. What the bundle's cache holds joins this machine's, so
    that it need not compile; torch looks up its entries by source, version and processor, and compiles what does not fit."""
    _join_cache(folder)
    with torch.device("meta"):
        model = build(manifest.config)
    model.quantize(manifest.quantization)
    model.load_state_dict(read_weights(folder / WEIGHTS, device), assign=True)
    model.eval().requires_grad_(False)
    model.ops = TorchOps(manifest.attention)
    return TorchRuntime(prepare(model, compiled))


def _join_cache(folder: Path) -> None:
    if (folder / CACHE).is_dir():
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        shutil.copytree(folder / CACHE, cache_dir(), dirs_exist_ok=True, copy_function=_copy_missing)


def _copy_missing(source: str, target: str) -> None:
    if not Path(target).exists():
        shutil.copy2(source, target)
