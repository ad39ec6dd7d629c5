"""The command line: `bagel-opt`, or `python -m bagel_opt`."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bagel_opt import __version__
from bagel_opt.api import BACKENDS, Model, load
from bagel_opt.memory import BYTES
from bagel_opt.profile import profile_names
from bagel_opt.recipe import load_recipe
from bagel_opt.request import RENORM_TYPES, Options
from bagel_opt.sampling.plan import DEFAULT_TOKENS

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # as torch says it of a GPU and of a CPU
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status: 0 for success, 1 for an error, which is one line on stderr, 2 for bad usage."""
    arguments = parser().parse_args(argv)
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
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        return _fail("out of memory; use a smaller picture, shorter text, another --dtype or --device cpu")
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"bagel-opt: {message}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("bagel-opt", description="BAGEL on static shapes: draw, edit, understand, export.")
    top.add_argument("--version", action="version", version=f"bagel-opt {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        for field, meaning in positional:
            sub.add_argument(field, help=meaning)
        return sub

    image, out = ("image", "picture file"), "where to write the picture (default: %(default)s)"
    draw = command("generate", "Draw a picture from a text.", generate, ("prompt", "what to draw"))
    edit_ = command("edit", "Change a picture.", edit, image, ("prompt", "what to change"))
    ask = command("understand", "Answer a question about a picture.", understand, image, ("prompt", "the question"))
    talk = command("chat", "Answer a text.", chat, ("prompt", "the text"))
    for sub in (draw, edit_):
        sub.add_argument("-o", "--out", type=Path, default=Path("out.png"), help=out)
        _picture_options(sub, sized=sub is draw)
    for sub in (draw, edit_, ask, talk):
        _model_options(sub)
        _text_options(sub)

    export_ = command("export", "Write a bundle that another runtime loads.", export)
    export_.add_argument("--checkpoint", help="checkpoint folder or repo id (default: the model that ships)")
    export_.add_argument("--recipe", help="recipe file, or a name from export/; the options below override it")
    export_.add_argument("--format", help="onnx (default), aoti, export or compile")
    export_.add_argument(
        "--profile", action="append", help="profile file, or a name from profiles/; several share the weights"
    )
    export_.add_argument("--out", required=True, type=Path, help="folder of the bundle")
    export_.add_argument("--dtype", help="float32 (default), float16, or bfloat16 where it is not ONNX")
    export_.add_argument("--attention", help="for compile: auto (default), sdpa, cudnn, flex or flash")
    export_.add_argument("--device", help="cpu (default), or cuda where it is not ONNX")
    export_.add_argument("--verify", action="store_true", help="compare the bundle with eager float32 before it counts")

    time_ = command("bench", "Time models side by side, each in a process of its own.", bench)
    time_.add_argument("sources", nargs="*", help="checkpoint folders and bundles (default: the model that ships)")
    time_.add_argument("--preset", choices=["h100"], help="BAGEL-7B's sizes with random weights, on this GPU")
    time_.add_argument("--backends", default="eager", help="for checkpoints, with commas: eager,compile (eager)")
    time_.add_argument(
        "--export",
        metavar="PROFILE",
        action="append",
        help="also export each checkpoint for it (or for several) and time the bundles",
    )
    time_.add_argument("--formats", default="onnx", help="of the bundles, with commas: onnx,aoti,export,compile (onnx)")
    time_.add_argument(
        "--official", metavar="DIR", help="a checkout of the official code, timed first on the same weights"
    )
    time_.add_argument("--official-python", default=sys.executable, help="Python with what the official code needs")
    for name, value, text in (
        ("height", None, "pixels (the largest of the model, up to 1024)"),
        ("width", None, "pixels"),
        ("steps", 8, "timed flow steps per picture (8)"),
        ("tokens", 32, "timed tokens per answer (32)"),
        ("repeats", 3, "runs after the warm-up (3)"),
    ):
        time_.add_argument(f"--{name}", type=_count, default=value, metavar="N", help=text)
    for name in ("device", "dtype", "profile"):
        time_.add_argument(f"--{name}", help="as for the other commands")
    time_.add_argument("--attention", default="auto", help="auto, sdpa, cudnn, flex or flash")
    time_.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")

    serve_ = command("serve", "Serve a model over HTTP, OpenAI-compatible, with a page to try it.", serve)
    _serve_options(serve_)

    show = command("inspect", "Show what a checkpoint or a bundle holds.", inspect)
    show.add_argument(
        "checkpoint", nargs="?", help="checkpoint folder, repo id or bundle (default: the model that ships)"
    )
    show.add_argument("--profile", action="append", default=[], help="also the memory that this profile needs")
    show.add_argument("--dtype", default="float32", choices=BYTES, help="of that (float32); a bundle has its own")
    return top


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _flag(sub: argparse.ArgumentParser, name: str, **settings: object) -> None:
    """An option under its official name, with dashes or underscores."""
    spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    sub.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, **settings)


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", help="checkpoint folder, repo id or bundle (default: the model that ships)")
    _load_options(sub)


def _load_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("model")
    group.add_argument("--backend", default="eager", help=f"{' or '.join(BACKENDS)}; a bundle brings its own")
    group.add_argument("--device", help="cpu, cuda or cuda:N")
    group.add_argument("--dtype", help="float32, bfloat16 or float16")
    group.add_argument("--attention", default="auto", help="auto, sdpa, cudnn, flex or flash")
    group.add_argument("--profile", help="profile file or name; default: shapes fitted to the request")
    group.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare a huge bundle's files with their sha256"
    )


def _serve_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "checkpoint", nargs="?", help="bundle, checkpoint folder or repo id (default: the model that ships)"
    )
    _load_options(sub)
    group = sub.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    group.add_argument("--name", help="the model's name for clients (default: the folder's)")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="clients must send one of these as bearer token; better in BAGEL_OPT_API_KEYS, with commas",
    )
    group.add_argument(
        "--remote-images", action="store_true", help="fetch input pictures from public http(s) addresses too"
    )
    limits = sub.add_argument_group("limits")
    for name, value, text in (
        ("max-queue", 64, "requests that wait or run; more are answered 429"),
        ("timeout", 600, "seconds until a request is given up"),
        ("max-body", 32, "MiB of a request's body"),
        ("max-pixels", 2**24, "pixels of an input picture"),
        ("max-images", 8, "input pictures of a request"),
        ("max-n", 8, "pictures that one request may ask for"),
        ("max-timesteps", 200, "num_timesteps"),
    ):
        limits.add_argument(f"--{name}", type=_count, default=value, metavar="N", help=f"{text} (%(default)s)")


def _text_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("text")
    _flag(group, "think", action="store_true", help="think before answering or drawing")
    _flag(group, "max_think_tokens", type=int, metavar="N", help="longest text to generate (1000)")
    _flag(group, "do_sample", action="store_true", help="sample the text instead of taking the likeliest token")
    _flag(group, "text_temperature", type=float, metavar="T", help="temperature of sampling (0.3)")
    _flag(group, "seed", type=int, metavar="N", help="same seed, same answer")


def _picture_options(sub: argparse.ArgumentParser, sized: bool) -> None:
    group = sub.add_argument_group("picture")
    if sized:
        _flag(group, "height", type=int, metavar="PIXELS", help="a multiple of 16 (1024)")
        _flag(group, "width", type=int, metavar="PIXELS", help="a multiple of 16 (1024)")
    _flag(group, "num_timesteps", type=int, metavar="N", help="points of the flow schedule (50)")
    _flag(group, "timestep_shift", type=float, metavar="S", help="above 1: more steps at high noise (3)")
    _flag(group, "cfg_text_scale", type=float, metavar="S", help="how strongly to follow the text (4)")
    _flag(group, "cfg_img_scale", type=float, metavar="S", help="how strongly to keep the input image (1.5)")
    _flag(group, "cfg_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times with guidance (0.4 1)")
    _flag(group, "cfg_renorm_min", type=float, metavar="R", help="smallest rescaling of the guided velocity (0)")
    _flag(group, "cfg_renorm_type", help=f"{', '.join(RENORM_TYPES)} (global)")
    _flag(group, "negative_prompt", metavar="TEXT", help="what not to draw")
    _flag(group, "step_cache", help="taylorseer: fewer evaluations, nearly the same picture")


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
        raise ValueError("give --profile or --recipe; profiles/ has " + ", ".join(profile_names()))
    with _bar("exporting") as update:
        folder = write_bundle(a.checkpoint, a.out, profiles, progress=update, verify=a.verify, **options)
    print(folder)


def bench(a: argparse.Namespace) -> None:
    from bagel_opt.bench import Work, default_side, table
    from bagel_opt.bench import bench as time_all

    if a.json and not a.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {a.json}: there is no folder {a.json.parent}")
    if a.preset:
        return _full_size(a)
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
    Console(highlight=False).print(table(results))
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if failed := [result["name"] for result in results if "error" in result]:
        raise ValueError(f"could not be timed: {', '.join(failed)}; the table says why")


def _full_size(a: argparse.Namespace) -> None:
    from bagel_opt.bench.full_size import run_full_size, tables

    def save(results: dict) -> None:
        if a.json:
            a.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with _bar("timing") as update:
        results = run_full_size(a.official, a.repeats, lambda what: update(what, 0, 0), save)
    for table in tables(results):
        Console(highlight=False).print(table)


def serve(a: argparse.Namespace) -> None:
    try:
        from bagel_opt.serve import Limits
        from bagel_opt.serve import serve as serve_model
    except ImportError as error:
        raise ImportError(f"{error}; the server needs: pip install 'bagel-opt[serve]'") from None

    if a.checkpoint is None and a.profile is None:
        a.profile = "demo"
    model = _load(a)
    if not model.profiles:
        raise ValueError(
            "--profile is missing: a server needs static shapes; profiles/ has " + ", ".join(profile_names())
        )
    keys = [*a.api_key, *filter(None, os.environ.get("BAGEL_OPT_API_KEYS", "").split(","))]
    serve_model(
        model,
        a.name or (Path(a.checkpoint).resolve().name if a.checkpoint else "bagel-demo"),
        host=a.host,
        port=a.port,
        keys=keys,
        limits=Limits(a.max_body * 2**20, a.max_pixels, a.max_images, a.max_n, a.max_timesteps),
        max_queue=a.max_queue,
        timeout=a.timeout,
        remote=a.remote_images,
    )


def inspect(a: argparse.Namespace) -> None:
    from bagel_opt.inspect import describe

    output = Console(highlight=False)
    for table in describe(a.checkpoint, a.profile, a.dtype):
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
        settings = {name: getattr(a, name) for name in ("backend", "device", "dtype", "attention", "check")}
        return load(
            a.checkpoint, profile=a.profile, progress=lambda done, total: update("loading", done, total), **settings
        )


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


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr where that is a terminal; yields update(what, done, total)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task(what, total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
