"""What compilers have made, kept in bundles so that the process that loads one need not compile: torch.compile's caches, and
the kernels of FlashAttention 4 and of quack-kernels."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.utils import clear_caches

from bagel_opt.files.manifest import CACHE
from bagel_opt.installed import kernel_folder
from bagel_opt.model import attention
from bagel_opt.model.mixture import Mixture
from bagel_opt.profile import Profile
from bagel_opt.programs.exercise import run_programs
from bagel_opt.runtime import fused_products
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare


def warm(model: Mixture, profiles: list[Profile], folder: Path, progress: Callable[[str, int, int], None]) -> None:
    """Runs every program of all profiles once, compiled, into an empty cache, and keeps the cache in folder/cache."""
    kernels = _kernel_folders(model)  # named before torch's own is another
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        torch.compiler.reset()
        clear_caches()  # what this process has compiled before would not be written again
        try:
            runtime = TorchRuntime(prepare(model, compiled=True))
            for done, profile in enumerate(profiles):
                progress(f"compiling for {profile.name}", done, len(profiles))
                run_programs(runtime, model.config, profile)
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
            torch.compiler.reset()
        _copy(Path(empty), folder / CACHE)
    for name, source in kernels.items():
        _copy(source, folder / CACHE / name)


def keep_attention_kernels(model: Mixture, folder: Path) -> None:
    """For a bundle whose programs call FlashAttention: compiles its kernels, and keeps them in folder/cache."""
    for name, source in _kernel_folders(model).items():
        if name == "flash_attention":
            from bagel_opt.runtime.warm_up import ATTENTION, compile_part, heads_of

            heads = {"layers": heads_of(model.config)["layers"]}  # the programs' ViT has SDPA
            for part in range(len(ATTENTION)):
                compile_part(model.device, model.dtype, heads, part)
            _copy(source, folder / CACHE / name)


def _kernel_folders(model: Mixture) -> dict[str, Path]:
    """Where those packages keep what they compile, by the names of these folders in a bundle's cache; of those that the model
    uses."""
    if model.ops.backend != "flash" or attention.flash_package() != "flash_attn.cute":
        return {}
    fused = fused_products.possible(model.device, model.dtype)
    return {name: kernel_folder(name) for name in (["flash_attention", "quack"] if fused else ["flash_attention"])}


def _copy(source: Path, target: Path) -> None:
    """Every file. copytree would go on where the disk is full, and list them all."""
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)
