"""The command line's options."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bagel_opt import __version__
from bagel_opt.cli.argument_types import adapter, count, kept_apart, parallel, port, quantization, sizes
from bagel_opt.dtypes import COMPUTE
from bagel_opt.loading import BACKENDS
from bagel_opt.option_kinds import Choice, Flag, Interval, Number, Texts
from bagel_opt.options import EVERY, INPUTS, INTERLEAVING, PICTURE, READING, SIZE, VIDEO, Option, described

PRESET_BUNDLES = ("onnx", "aoti")


def parser(runs: Mapping[str, Callable[[argparse.Namespace], object]]) -> argparse.ArgumentParser:
    """The whole command line. runs: what each command does."""
    top = argparse.ArgumentParser("bagel-opt", description="BAGEL on static shapes: draw, edit, understand, export.")
    top.add_argument("--version", action="version", version=f"bagel-opt {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, *positional: tuple[str, str]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=runs[name])
        for field, meaning in positional:
            sub.add_argument(field, help=meaning, nargs="?" if field == "image" else None)  # there may be --video
        return sub

    image, out = ("image", "picture file"), "where to write it (default: out.png, of a video out.mp4)"
    draw = command("generate", "Draw a picture or a video from a text.", ("prompt", "what to draw"))
    edit_ = command("edit", "Change a picture or a video.", image, ("prompt", "what to change"))
    ask = command("understand", "Answer a question about a picture or a video.", image, ("prompt", "the question"))
    talk = command("chat", "Answer a text.", ("prompt", "the text"))
    think = command("interleave", "Answer in texts and pictures, in turn.")
    think.add_argument("inputs", nargs="+", help="texts and picture files, in order")
    for sub in (draw, edit_, think):
        several = "where to write the pictures, as out-1.png and so on (default: out.png)"
        sub.add_argument("-o", "--out", type=Path, help=several if sub is think else out)
        _options(sub, "picture", SIZE, PICTURE, INPUTS)
    _options(think, "texts and pictures in turn", INTERLEAVING)
    draw.add_argument(
        "--output", dest="drawn", choices=["image", "video"], default="image", help="what to draw (image)"
    )
    draw.add_argument("--image", metavar="FILE", help="a picture that the video begins with")
    for sub in (edit_, ask):
        sub.add_argument("--video", metavar="FILE", help="a video in place of the picture")
    for sub in (draw, edit_, ask):
        _options(sub, "videos, of models that draw and read them", VIDEO)
    for sub in (draw, edit_, ask, talk, think):
        _model_options(sub)
        _options(sub, "text and seed", EVERY)
    for sub in (edit_, ask, think):
        _options(sub, "input pictures", READING)

    export_ = command("export", "Write a bundle that another runtime loads.")
    export_.add_argument("--checkpoint", help="checkpoint folder or repo id (default: the model that ships)")
    export_.add_argument("--recipe", help="recipe file, or a name from export/; the options below override it")
    export_.add_argument("--format", help="onnx (default), aoti, export or compile")
    export_.add_argument(
        "--profile", action="append", help="profile file, or a name from profiles/; several share the weights"
    )
    export_.add_argument("--out", required=True, type=Path, help="folder of the bundle")
    export_.add_argument("--dtype", help="float32 (default), float16 or bfloat16; ONNX for the CPU has no bfloat16")
    export_.add_argument(
        "--attention", help="auto (default), sdpa or flash, and for compile cudnn or flex; for onnx auto"
    )
    export_.add_argument("--device", help="cpu (default) or cuda")
    _quantization(export_)
    _weights(export_)
    export_.add_argument(
        "--verify", action="store_true", help="compare with eager float32 before the bundle is moved into place"
    )

    quantize_ = command("quantize", "Write a checkpoint in 8 or 4 bits, which loads as it is.")
    quantize_.add_argument("checkpoint", nargs="?", help="folder, file or repo id (default: the model that ships)")
    _quantization(quantize_, required=True)
    quantize_.add_argument("--out", required=True, type=Path, help="folder of the new checkpoint; absent or empty")
    _weights(quantize_)

    convert_ = command("convert", "Write the autoencoder of a Lance checkpoint, a pickle, as safetensors.")
    convert_.add_argument("checkpoint", help="folder or repo id of the download, or its Wan2.2_VAE.pth")
    convert_.add_argument("--out", type=Path, help="folder for the file (default: beside the pickle)")

    time_ = command("bench", "Time models side by side, each in a process of its own.")
    time_.add_argument("sources", nargs="*", help="checkpoint folders and bundles (default: the model that ships)")
    time_.add_argument("--preset", choices=["h100"], help="BAGEL-7B's sizes with random weights, on this GPU")
    for kind in PRESET_BUNDLES:
        time_.add_argument(
            f"--{kind}",
            metavar="DIR",
            type=Path,
            help=f"with --preset: also from an {kind} bundle that is exported to this folder (32 GB) or lies there",
        )
    time_.add_argument(
        "--quantization", metavar="KINDS", help="with --preset: also with quantised weights, with commas: fp8,int8,int4"
    )
    time_.add_argument(
        "--memory",
        metavar="SIZES",
        help="with --preset: also under caps of memory, with commas, as 24GB,16GB, in 16 bits and in each of --quantization",
    )
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
        time_.add_argument(f"--{name}", type=count, default=value, metavar="N", help=text)
    for name in ("device", "dtype", "profile"):
        time_.add_argument(f"--{name}", help="as for the other commands")
    time_.add_argument("--attention", default="auto", help="auto, sdpa, cudnn, flex or flash")
    time_.add_argument(
        "--gpus", type=count, metavar="N", help="how many each model has; with --preset: also time so many, in each way"
    )
    time_.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")

    serve_ = command("serve", "Serve a model over HTTP, OpenAI-compatible, with a page to try it.")
    serve_options(serve_)

    check = command("doctor", "Say what runs by what on this machine, what is not used, why, and what to install.")
    check.add_argument("--json", action="store_true", help="the same facts as JSON")

    show = command("inspect", "Show what a checkpoint, a bundle or any file of weights holds, and what it would need.")
    show.add_argument("checkpoint", nargs="?", help="folder, file, repo id or bundle (default: the model that ships)")
    show.add_argument("--profile", action="append", default=[], help="also the memory that this profile needs")
    _weights(show)
    show.add_argument("--dtype", choices=COMPUTE, help="to reckon that memory in (float32; with --memory bfloat16)")
    _memory(show, "also what would lie where on a GPU of so much memory, as 12GB, and how long steps would take")
    _quantization(show)
    _no_check(show)
    return top


def _options(sub: argparse.ArgumentParser, title: str, *groups: str) -> None:
    """The options of a request, each under its official name with dashes or underscores."""
    group = sub.add_argument_group(title)
    for option in described(*groups).values():
        spellings = dict.fromkeys((f"--{option.name.replace('_', '-')}", f"--{option.name}"))
        group.add_argument(*spellings, dest=option.name, default=argparse.SUPPRESS, **_settings(option))


def _settings(option: Option) -> dict:
    """Of add_argument: the type alone is checked there, all else where Options are made, before a model is loaded."""
    values = option.default if isinstance(option.default, tuple) else (option.default,)
    default = (
        option.unset
        if option.default is None
        else " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    )
    about = {"help": f"{option.help} ({default})"}
    match option.kind:
        case Flag():
            return {"action": "store_true", "help": option.help}
        case Number(whole=True):
            return about | {"type": int, "metavar": "N"}
        case Number():
            return about | {"type": float, "metavar": "X"}
        case Interval():
            return about | {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        case Choice(values):
            return about | {"metavar": "|".join(values)}
        case Texts():
            return about | {"action": "append", "metavar": "TEXT"}
    return about | {"metavar": "TEXT"}


def _model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", help="checkpoint folder, repo id or bundle (default: the model that ships)")
    _load_options(sub)


def _load_options(sub: argparse.ArgumentParser, profile: str = "shapes fitted to the request") -> None:
    group = sub.add_argument_group("model")
    group.add_argument("--backend", default="eager", help=f"{' or '.join(BACKENDS)}; a bundle brings its own")
    group.add_argument("--device", help="cpu, cuda or cuda:N")
    group.add_argument("--dtype", help="float32, bfloat16 or float16")
    group.add_argument("--attention", default="auto", help="auto, sdpa, cudnn, flex or flash")
    group.add_argument("--profile", help=f"profile file or name; default: {profile}")
    _quantization(group)
    _memory(group, "what a GPU may be filled with, as 12GB; weights beyond that stream in from the host (all of it)")
    _gpus(group)
    _weights(group)
    _no_check(group)


def _memory(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument("--memory", metavar="SIZE", help=text)


def _gpus(group: argparse._ActionsContainer) -> None:
    group.add_argument("--gpus", type=count, metavar="N", help="how many compute each request together (1)")
    group.add_argument(
        "--parallel",
        type=parallel,
        default="auto",
        metavar="WAY",
        help="what they share out: guidance, sequence, tensor, several with ranks of each, as guidance=2,sequence=2, or auto",
    )


def _weights(group: argparse._ActionsContainer) -> None:
    group.add_argument("--weights", metavar="FILE", help="a fine-tune's file, folder or repo id over the checkpoint")
    group.add_argument(
        "--lora",
        metavar="FILE[=FACTOR]",
        action="append",
        type=adapter,
        default=[],
        help="an adapter's file or folder, as peft writes them; may be given several times",
    )


def _quantization(group: argparse._ActionsContainer, required: bool = False) -> None:
    group.add_argument(
        "--quantization",
        metavar="KIND",
        type=quantization,
        required=required,
        help="fp8, int8 or int4: weights of both experts in 8 or 4 bits; or by part, as gen=fp8,und=int4,vit=int8,head=int8",
    )


def _no_check(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare a huge bundle's files with their sha256"
    )


def load_settings(a: argparse.Namespace) -> dict:
    """Of bagel_opt.load, besides the source and the profile."""
    names = ("backend", "device", "dtype", "attention", "weights", "lora", "quantization", "memory")
    names += ("gpus", "parallel", "check")
    return {name: getattr(a, name) for name in names} | {"adapters": dict(vars(a).get("adapters", ()))}


def serve_options(sub: argparse.ArgumentParser) -> None:
    """Those of `bagel-opt serve`."""
    sub.add_argument(
        "checkpoint", nargs="?", help="bundle, checkpoint folder or repo id (default: the model that ships)"
    )
    _load_options(sub, "demo for the model that ships; another checkpoint needs one")
    sub.add_argument(
        "--adapter",
        dest="adapters",
        metavar="NAME=FILE",
        action="append",
        type=kept_apart,
        default=[],
        help="an adapter that is kept apart, for requests that ask for it: adapters={NAME: scale}; may be given several times",
    )
    group = sub.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    group.add_argument("--port", type=port, default=8000, help="port to listen on (%(default)s); 0 takes a free one")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which a proxy passes requests on; on loopback the server answers for no others than its own",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of pages elsewhere that may call the server from a browser, as https://example.org; * is all (none)",
    )
    group.add_argument(
        "--name",
        action="append",
        help="the model's name for clients (default: the folder's); may be given several times, as for clients with a fixed one",
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        help="clients must send one of these as bearer token; better in BAGEL_OPT_API_KEYS, with commas",
    )
    group.add_argument(
        "--remote-images", action="store_true", help="fetch input pictures from public http(s) addresses too"
    )
    group.add_argument(
        "--warm",
        type=sizes,
        default=(),
        metavar="SIZES",
        help="draw, edit and ask about pictures of these sizes, as 1024x1024,768x1024, before the first request (none)",
    )
    many = sub.add_argument_group("replicas, on Ray Serve")
    many.add_argument("--replicas", type=count, metavar="N", help="engines with a model each, behind one address")
    many.add_argument("--max-replicas", type=count, metavar="N", help="start more while requests wait, up to so many")
    many.add_argument("--requests-per-replica", type=count, metavar="N", help="that autoscaling aims at (4)")
    many.add_argument("--cpus-per-replica", type=float, metavar="N", help="cores, and threads, of each (1)")
    many.add_argument("--gpus-per-replica", type=float, metavar="N", help="GPUs of each (0)")
    limits = sub.add_argument_group("limits")
    for name, value, text in (
        ("max-queue", 64, "requests that wait or run; more are answered 429"),
        ("timeout", 600, "seconds until a request is given up"),
        ("max-body", 32, "MiB of a request's body"),
        ("max-pixels", 2**24, "pixels of an input picture"),
        ("max-images", 8, "input pictures of a request"),
        ("max-n", 8, "pictures that one request may ask for, as n or max_rounds"),
        ("max-timesteps", 200, "largest num_timesteps of a request"),
    ):
        limits.add_argument(f"--{name}", type=count, default=value, metavar="N", help=f"{text} (%(default)s)")
