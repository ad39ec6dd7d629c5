"""Time per flow step of eager, compile and ONNX on this machine's CPU, in one run: prints the README's table.

python tests/timing.py            the golden checkpoint, and one of about 300 M random parameters made on the spot
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_checkpoint import make, sizes_for
from rich.console import Console
from rich.table import Table
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.export import export


def step_times(model: bagel_opt.Model, side: int, steps: int) -> list[float]:
    """Seconds of each flow step of one picture with text guidance, two rows, after a warm-up picture."""
    stamps = []
    options = {"height": side, "width": side, "seed": 0, "cfg_interval": (0.0, 1.0)}
    model.generate("a red circle", num_timesteps=4, **options)
    model.generate(
        "a red circle", num_timesteps=steps + 2, on_step=lambda event: stamps.append(time.perf_counter()), **options
    )
    return [b - a for a, b in itertools.pairwise(stamps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps per picture")
    steps = parser.parse_args().steps
    table = Table(
        "checkpoint", "picture", "eager", "compile", "ONNX Runtime", "export", title="ms per flow step, median"
    )
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        make(large, **sizes_for(300_000_000))
        for name, checkpoint, side in (("golden, 1.5 M", CHECKPOINT, 128), ("random, 300 M", large, 256)):
            tokens = (side // 16) ** 2
            profile = Profile("timing", rows=2, slots=2 * tokens + 128, text=64, patches=tokens, latents=tokens)
            start = time.perf_counter()
            bundle = export(checkpoint, Path(folder) / f"bundle-{side}", profile)
            exported = time.perf_counter() - start
            cells = []
            for source, backend in ((checkpoint, "eager"), (checkpoint, "compile"), (bundle, "onnx")):
                model = bagel_opt.load(
                    source, backend=backend, **({} if source is bundle else {"device": "cpu", "profile": profile})
                )
                times = step_times(model, side, steps)
                cells.append(f"{1000 * statistics.median(times):.1f} ({1000 * min(times):.1f}-{1000 * max(times):.1f})")
            table.add_row(name, f"{side}x{side}", *cells, f"{exported:.0f} s")
    Console(width=140).print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")


if __name__ == "__main__":
    main()
