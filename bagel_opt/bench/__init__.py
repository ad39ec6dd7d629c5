"""Timing models side by side: each contender in a process of its own, one after another, on the same work."""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from bagel_opt.files.finding import find_bundle, find_place
from bagel_opt.files.manifest import read_manifest
from bagel_opt.loading import BACKENDS, shipped_model

# What is measured, and the head of its column.
COLUMNS = {
    "load": "load, s",
    "prefill": "first token, ms",
    "token": "token, ms",
    "step": "flow step, ms",
    "edit_step": "edit step, ms",
    "request": "whole picture, s",
}


@dataclass(frozen=True)
class Work:
    """What every contender does, after doing all of it once to warm up.

    A picture of height x width from a text, guided at all times (two rows); an edit of one (three rows); an answer to a
    question about one. `steps` flow steps are timed in each picture and `tokens` tokens in each answer, `repeats` times.
    """

    height: int
    width: int
    steps: int = 8
    tokens: int = 32
    repeats: int = 3
    prompt: str = "a large red circle in the center and a small blue star at the top left on a white background"


@dataclass(frozen=True)
class Contender:
    """What to time: a checkpoint folder or a bundle with a backend, or the official code on a checkpoint."""

    name: str
    source: str
    backend: str = "eager"
    official: str | None = None  # a checkout of the official code
    python: str = sys.executable
    device: str | None = None
    dtype: str | None = None
    attention: str = "auto"
    profile: str | None = None
    gpus: int | None = None
    export_s: float | None = None  # how long the export of this bundle took


def default_side(source: str | None) -> int:
    """The side of the largest square picture of a checkpoint or a bundle, up to 1024. Raises what `load` raises."""
    source = source or shipped_model()
    if folder := find_bundle(source):
        return read_manifest(folder).config.default_size
    from bagel_opt.files.checkpoint import Checkpoint

    return Checkpoint(source).config.default_size


def time_contender(contender: Contender, work: Work) -> dict:
    """A contender's figures: lists of milliseconds or seconds by name, peak memory and size in bytes, or an error."""
    here = Path(__file__).parent
    script = [str(here / "official.py")] if contender.official else ["-m", "bagel_opt.bench.worker"]
    job = json.dumps({**asdict(contender), "work": asdict(work)})
    command = [contender.python, *script, job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        return {
            "error": next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), said[-1])
        }
    source = Path(contender.source)
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else []
    return {**json.loads(lines[-1]), "size": sum(path.stat().st_size for path in files), "export": contender.export_s}


def bench(
    sources: list[str],
    work: Work,
    *,
    backends: tuple[str, ...] = ("eager",),
    profiles: Sequence[str] = (),
    formats: tuple[str, ...] = ("onnx",),
    official: str | None = None,
    official_python: str = sys.executable,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    **settings: str | int | None,
) -> list[dict]:
    """Times checkpoints with each backend, bundles, and on request bundles exported for `profiles` and the official code.
    Formats that cannot hold the dtype are left out.

    -> one dict per contender: its fields, "work", and its figures or its "error". settings: device, dtype, attention,
    profile and gpus, as `bagel_opt.load` takes them; the official code has one GPU, and bundles the profiles' shapes. Raises
    ValueError for an unknown backend, and what `export` raises.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    gpus = settings.get("gpus") or 1
    if profiles and gpus > 1 and "onnx" in formats:
        raise ValueError(
            f"gpus={gpus}: bundles of format 'onnx' run on one GPU; time those without it, or name others, as --formats export"
        )
    if official and not (Path(official) / "inferencer.py").is_file():
        raise FileNotFoundError(f"{official} is no checkout of the official code: it has no inferencer.py")
    with tempfile.TemporaryDirectory() as temporary:
        contenders: list[Contender] = []
        own = {key: settings.get(key) for key in ("device", "gpus")}
        for number, source in enumerate(sources or [str(shipped_model())]):
            name = Path(source).name if len(sources) < 2 else f"{number}:{Path(source).name}"
            if find_bundle(source):
                contenders.append(Contender(f"{name}, bundle", source, "bundle", **own))
                continue
            source = str(find_place(source))
            if official:
                where = {key: settings.get(key) for key in ("device", "dtype")}
                title = f"{name}, official code{', one GPU' * (gpus > 1)}"
                contenders.append(Contender(title, source, "", official, official_python, **where))
            contenders += [Contender(f"{name}, {backend}", source, backend, **settings) for backend in backends]
            for format in formats if profiles else ():
                from bagel_opt.export.bundle import export, precisions

                progress(f"exporting {name} as {format}", 0, 0)
                device = (settings.get("device") or "cpu").partition(":")[0]
                how = {"dtype": settings.get("dtype") or "float32", "device": device}
                if format != "onnx":  # which has an attention of its own
                    how["attention"] = settings.get("attention") or "auto"
                if how["dtype"] not in precisions(format, how["device"]):
                    continue
                begun = time.perf_counter()
                bundle = export(source, Path(temporary) / f"{number}-{format}", profiles, format=format, **how)
                took = time.perf_counter() - begun
                contenders.append(Contender(f"{name}, {format} bundle", str(bundle), "bundle", export_s=took, **own))
        found = []
        for done, contender in enumerate(contenders):
            progress(contender.name, done, len(contenders))
            found.append({**asdict(contender), "work": asdict(work), **time_contender(contender, work)})
        progress("done", len(contenders), len(contenders))
    return found


def table(results: list[dict]) -> Table:
    """Medians with the least and the most in brackets. The last column compares flow steps with the first row's."""
    work = results[0]["work"]
    title = f"{work['width']}x{work['height']} pixels: medians (least-most) of {work['repeats']} runs after a warm-up"
    shown = Table("", *COLUMNS.values(), "peak", "size", "export, s", "step, times the first", title=title)
    first = None
    for result in results:
        if "error" in result:
            shown.add_row(result["name"], "failed")
            continue
        step = statistics.median(result["step"])
        first = first or step
        export = "" if result["export"] is None else f"{result['export']:.0f}"
        cells = [_cell(result[column], column) for column in COLUMNS]
        shown.add_row(
            result["name"], *cells, _bytes(result["peak"]), _bytes(result["size"]), export, f"{first / step:.2f}"
        )
    return shown


def _cell(values: list[float], column: str) -> str:
    def short(value: float) -> str:
        return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"

    text = f"{short(statistics.median(values))} ({short(min(values))}-{short(max(values))})"
    if column == "token":
        text += f", {1000 / statistics.median(values):.0f}/s"
    return text if len(values) > 1 else short(values[0])


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
