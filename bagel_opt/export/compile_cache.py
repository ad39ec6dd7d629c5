"""torch.compile's caches, filled at export so that the process that loads the bundle need not compile."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.utils import clear_caches

from bagel_opt.files.manifest import CACHE
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import Profile
from bagel_opt.programs.exercise import run_programs
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare


def warm(model: Bagel, profiles: list[Profile], folder: Path, progress: Callable[[str, int, int], None]) -> None:
    """Runs every program of all profiles once, compiled, into an empty cache, and keeps the cache in folder/cache."""
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
        for path in Path(empty).rglob("*"):  # copytree would go on where the disk is full, and list every file
            if path.is_file() and path.suffix != ".lock":
                to = folder / CACHE / path.relative_to(empty)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, to)
