"""The command line: `bagel-opt`, or `python -m bagel_opt`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bagel_opt.api import Model, load
from bagel_opt.arguments import PRESET_BUNDLES, parser
from bagel_opt.bundle import MANIFEST
from bagel_opt.profile import profile_names
from bagel_opt.recipe import load_recipe, recipe_names
from bagel_opt.request import Options
from bagel_opt.sampling.plan import DEFAULT_TOKENS

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of a GPU and of a CPU
NO_COMPILER = ("No working C++ compiler", "C++ compile error")  # as torch's compiler says it
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status: 0 for success, 1 for an error, which is one line on stderr, 2 for bad usage."""
    arguments = parser(COMMANDS).parse_args(argv)
    return guarded(lambda: arguments.run(arguments))


def guarded(run: Callable[[], object]) -> int:
    """Runs a command; an error of the user's or of a file becomes one line on stderr. -> the exit status"""
    try:
        run()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except UnidentifiedImageError as error:
        return _fail(f"{error}; give a PNG, JPEG or WebP picture")
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError, Image.DecompressionBombError) as error:
        return _fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        lines = str(error).splitlines()
        if failed := next((line for line in lines if any(text in line for text in NO_COMPILER)), None):
            return _fail(
                f"{failed.strip()}; compiling needs a C++ compiler, such as g++, or one named by CXX, and for a GPU the CUDA "
                "toolkit; --backend eager and bundles of --format onnx or export need none"
            )
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        said = " ".join(str(error).split("\n")[0].split())
        return _fail(
            f"out of memory{said and f' ({said})'}; use a smaller picture, a shorter text or a smaller profile, and for a "
            "checkpoint another --dtype or --device cpu"
        )
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"bagel-opt: {message}", file=sys.stderr)
    return status


# ---- commands


def generate(a: argparse.Namespace) -> None:
    _check_out(a.out)
    _save(a, _run(a, [a.prompt], "image"))


def edit(a: argparse.Namespace) -> None:
    _check_out(a.out)
    _save(a, _run(a, [_open(a.image), a.prompt], "image"))


def understand(a: argparse.Namespace) -> None:
    print(_run(a, [_open(a.image), a.prompt], "text")[0])


def chat(a: argparse.Namespace) -> None:
    print(_run(a, [a.prompt], "text")[0])


def export(a: argparse.Namespace) -> None:
    from bagel_opt.export import export as write_bundle

    options = dataclasses.asdict(load_recipe(a.recipe)) if a.recipe else {}
    options |= {name: getattr(a, name) for name in ("format", "dtype", "attention", "device") if getattr(a, name)}
    profiles = a.profile or options.get("profiles")
    options.pop("profiles", None)
    if not profiles:
        raise ValueError(
            f"give --profile or --recipe; profiles/ has {', '.join(profile_names())}; export/ has {', '.join(recipe_names())}"
        )
    with _bar("exporting") as update:
        folder = write_bundle(a.checkpoint, a.out, profiles, progress=update, verify=a.verify, **options)
    print(folder)


def bench(a: argparse.Namespace) -> None:
    from bagel_opt.bench import Work, default_side, table
    from bagel_opt.bench import bench as time_all

    if a.json and not a.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {a.json}: there is no folder {a.json.parent}")
    bundles = {kind: folder for kind in PRESET_BUNDLES if (folder := getattr(a, kind))}
    if bundles and not a.preset:
        raise ValueError(f"--{next(iter(bundles))} is for --preset; a bundle goes in by its folder")
    if a.preset:
        if a.sources:
            raise ValueError(f"--preset makes its own weights; leave {' '.join(a.sources)} out")
        return _full_size(a, bundles)
    side = min(map(default_side, a.sources or [None]))
    work = Work(a.height or side, a.width or side, a.steps, a.tokens, a.repeats)
    with _bar("timing") as update:
        results = time_all(
            a.sources,
            work,
            backends=tuple(a.backends.split(",")),
            profiles=a.export or (),
            formats=tuple(a.formats.split(",")),
            official=a.official,
            official_python=a.official_python,
            progress=update,
            **{name: getattr(a, name) for name in ("device", "dtype", "attention", "profile")},
        )
    _tables().print(table(results))
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if failed := [f"{result['name']} ({result['error']})" for result in results if "error" in result]:
        raise ValueError(f"could not be timed: {', '.join(failed)}")


def _full_size(a: argparse.Namespace, bundles: dict[str, Path]) -> None:
    from bagel_opt.bench.full_size import run_full_size
    from bagel_opt.bench.full_size_tables import tables

    def save(results: dict) -> None:
        if a.json:
            a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with _bar("timing") as update:
        results = run_full_size(a.official, bundles, a.repeats, lambda what: update(what, 0, 0), save)
    for table in tables(results):
        _tables().print(table)


def serve(a: argparse.Namespace) -> None:
    try:
        import bagel_opt.serve as server
    except ImportError as error:
        raise ImportError(f"{error}; the server needs: pip install 'bagel-opt[serve]'") from None

    if a.replicas is None:
        for name in ("max_replicas", "requests_per_replica", "cpus_per_replica", "gpus_per_replica"):
            if getattr(a, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for replicas; give --replicas too")
        settings = _serve_settings(a)
        server.serve(_load(a), settings.pop("name"), a.host, a.port, **settings)
        return
    try:
        from bagel_opt.serve.ray import serve_replicas
    except ImportError as error:
        raise ImportError(f"{error}; replicas need: pip install 'bagel-opt[ray]'") from None
    serve_replicas(**_replica_settings(a), host=a.host, port=a.port)


def serve_settings(options: dict[str, str]) -> dict:
    """Of bagel_opt.serve.ray.application, from the options of `bagel-opt serve` by name."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    source = [given.pop("checkpoint")] if "checkpoint" in given else []
    flags = []
    for name, value in given.items():
        if name not in ("remote-images", "no-check"):
            flags.append(f"--{name}={value}")
        elif str(value).lower() in ("true", "1", "yes"):
            flags.append(f"--{name}")
        elif str(value).lower() not in ("false", "0", "no"):
            raise ValueError(f"{name}={value!r}; allowed are true and false")
    return _replica_settings(parser(COMMANDS).parse_args(["serve", *source, "--replicas=1", *flags]))


def _serve_settings(a: argparse.Namespace) -> dict:
    from bagel_opt.inspect import describe
    from bagel_opt.serve import Limits

    if a.checkpoint is None and a.profile is None:
        a.profile = "demo"
    describe(a.checkpoint, check=a.check)  # what cannot be loaded should not cost starting a cluster
    if not a.profile and not (Path(a.checkpoint) / MANIFEST).is_file():
        raise ValueError(
            "--profile is missing: a server needs static shapes; profiles/ has " + ", ".join(profile_names())
        )
    return {
        "name": a.name or (Path(a.checkpoint).resolve().name if a.checkpoint else "bagel-demo"),
        "keys": [*a.api_key, *filter(None, os.environ.get("BAGEL_OPT_API_KEYS", "").split(","))],
        "limits": Limits(a.max_body * 2**20, a.max_pixels, a.max_images, a.max_n, a.max_timesteps),
        "max_queue": a.max_queue,
        "timeout": a.timeout,
        "remote": a.remote_images,
    }


def _replica_settings(a: argparse.Namespace) -> dict:
    from bagel_opt.serve.ray import Replicas

    settings = _serve_settings(a)
    given = {"requests": a.requests_per_replica, "cpus": a.cpus_per_replica, "gpus": a.gpus_per_replica}
    given = {name: value for name, value in given.items() if value is not None}
    return {
        "load": functools.partial(load, a.checkpoint, profile=a.profile, **_load_settings(a)),
        "replicas": Replicas(a.replicas, max(a.replicas, a.max_replicas or 1), **given),
        **settings,
    }


def inspect(a: argparse.Namespace) -> None:
    from bagel_opt.inspect import describe

    output = _tables()
    for table in describe(a.checkpoint, a.profile, a.dtype, check=a.check):
        output.print(table)


def _run(a: argparse.Namespace, inputs: list, output: str) -> list:
    options = {name: getattr(a, name) for name in Options.__dataclass_fields__ if hasattr(a, name)}
    if "cfg_interval" in options:
        options["cfg_interval"] = tuple(options["cfg_interval"])
    Options.make(options)  # a typing slip should not cost the loading of 29 GB
    model = _load(a)
    with _bar("denoising" if output == "image" else "writing") as update:

        def on_step(event: object) -> None:
            update("denoising", event.index + 1, event.total)

        written = []

        def on_token(token: int) -> None:
            written.append(token)
            update("writing", len(written), options.get("max_think_tokens", DEFAULT_TOKENS))

        return model.run(inputs, output=output, on_step=on_step, on_token=on_token, **options)


def _load(a: argparse.Namespace) -> Model:
    with _bar("loading") as update:
        progress = functools.partial(update, "loading")
        return load(a.checkpoint, profile=a.profile, progress=progress, **_load_settings(a))


def _load_settings(a: argparse.Namespace) -> dict:
    return {name: getattr(a, name) for name in ("backend", "device", "dtype", "attention", "check")}


def _open(path: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return ImageOps.exif_transpose(image)
    except SyntaxError as error:  # what PIL raises for damaged EXIF data
        raise ValueError(f"{path} is a damaged picture: {error}") from None


def _check_out(path: Path) -> None:
    """A typing slip should not cost the drawing of a picture."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {path}: the name must end in .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")


def _save(a: argparse.Namespace, outputs: list) -> None:
    *thoughts, picture = outputs
    for thought in thoughts:
        print(thought)
    picture.save(a.out)
    print(a.out)


def _tables() -> Console:
    """Where tables go. A pipe or a file has no width to break them at."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if fixed else 250)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where that is a terminal; yields update(what, done, total)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task(what, total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


COMMANDS = {run.__name__: run for run in (generate, edit, understand, chat, export, bench, serve, inspect)}
