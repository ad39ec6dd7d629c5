"""`bagel-opt bench`."""

import argparse
import json
from pathlib import Path

from bagel_opt.cli.arguments import PRESET_BUNDLES
from bagel_opt.cli.console import bar, tables
from bagel_opt.files.replacing import check_place, replacing

# What a preset does not leave to choose.
OWN_WORK = ("backends", "export", "height", "width", "steps", "tokens", "device", "dtype", "profile", "attention")


def bench(a: argparse.Namespace) -> None:
    from bagel_opt.bench import Work, default_side, table
    from bagel_opt.bench import bench as time_all

    if a.json:
        check_place(a.json, "--json")
    bundles = {kind: folder for kind in PRESET_BUNDLES if (folder := getattr(a, kind))}
    if bundles and not a.preset:
        raise ValueError(f"--{next(iter(bundles))} is for --preset; a bundle goes in by its folder")
    if a.quantization and not a.preset:
        raise ValueError("--quantization is for --preset; quantize a checkpoint, and time that")
    if a.memory and not a.preset:
        raise ValueError("--memory is for --preset")
    if a.formats and not a.export:
        raise ValueError("--formats is for --export, which names the profile of the bundles")
    if a.preset:
        if a.sources:
            raise ValueError(f"--preset makes its own weights; leave {' '.join(a.sources)} out")
        given = {word.removeprefix("--").partition("=")[0] for word in a.argv}
        if unused := [name for name in OWN_WORK if name in given]:
            raise ValueError(f"--{unused[0]}: --preset has its own; leave it out")
        if a.preset == "lance":
            for name in (*PRESET_BUNDLES, "quantization", "memory", "gpus"):
                if getattr(a, name):
                    raise ValueError(f"--{name} is for --preset h100, not for --preset lance; leave it out")
        return _full_size(a, bundles)
    side = min(map(default_side, a.sources or [None]))
    work = Work(a.height or side, a.width or side, a.steps, a.tokens, a.repeats)
    with bar("timing") as update:
        results = time_all(
            a.sources,
            work,
            backends=tuple(a.backends.split(",")),
            profiles=a.export or (),
            formats=tuple((a.formats or "onnx").split(",")),
            official=a.official,
            official_python=a.official_python,
            progress=update,
            **{name: getattr(a, name) for name in ("device", "dtype", "attention", "profile", "gpus")},
        )
    tables().print(table(results))
    if a.json:
        _write_json(a.json, results)
    if failed := [f"{result['name']} ({result['error']})" for result in results if "error" in result]:
        raise ValueError(f"could not be timed: {', '.join(failed)}")


def _full_size(a: argparse.Namespace, bundles: dict[str, Path]) -> None:
    from bagel_opt.bench.full_size import run_full_size
    from bagel_opt.bench.full_size_lance import run_lance
    from bagel_opt.bench.full_size_tables import tables as full_size_tables

    def save(results: dict) -> None:
        if a.json:
            _write_json(a.json, results)

    with bar("timing") as update:

        def progress(what: str) -> None:
            update(what, 0, 0)

        if a.preset == "lance":
            results = run_lance(a.official, a.repeats, progress, save)
        else:
            kinds, caps = (given.split(",") if given else [] for given in (a.quantization, a.memory))
            results = run_full_size(a.official, bundles, kinds, caps, a.gpus or 1, a.repeats, progress, save)
    for table in full_size_tables(results):
        tables().print(table)


def _write_json(path: Path, results: list | dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
