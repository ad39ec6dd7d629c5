"""The command line's options."""

import argparse
import sys
from collections.abc import Callable, Mapping

from bagel_opt import __version__
from bagel_opt.cli.argument_types import count, path, word
from bagel_opt.cli.model_arguments import (
    check_option,
    memory_option,
    model_options,
    quantization_option,
    weights_options,
)
from bagel_opt.cli.serve_arguments import serve_options
from bagel_opt.dtypes import COMPUTE
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
        sub.add_argument("-o", "--out", type=path, help=several if sub is think else out)
        _options(sub, "picture", SIZE, PICTURE, INPUTS)
    _options(think, "texts and pictures in turn", INTERLEAVING)
    draw.add_argument(
        "--output", dest="drawn", choices=["image", "video"], default="image", help="what to draw (image)"
    )
    draw.add_argument("--image", type=word, metavar="FILE", help="a picture that the video begins with")
    for sub in (edit_, ask):
        sub.add_argument("--video", type=word, metavar="FILE", help="a video in place of the picture")
    for sub in (draw, edit_, ask):
        _options(sub, "videos, of models that draw and read them", VIDEO)
    for sub in (draw, edit_, ask, talk, think):
        model_options(sub)
        _options(sub, "text and seed", EVERY)
    for sub in (edit_, ask, think):
        _options(sub, "input pictures", READING)

    export_ = command("export", "Write a bundle that another runtime loads.")
    export_.add_argument("--checkpoint", type=word, help="checkpoint folder or repo id (default: the model that ships)")
    export_.add_argument(
        "--recipe", type=word, help="recipe file, or a name from export/; the options below override it"
    )
    export_.add_argument("--format", type=word, help="onnx (default), aoti, export or compile")
    export_.add_argument(
        "--profile",
        type=word,
        action="append",
        help="profile file, or a name from profiles/; several share the weights",
    )
    export_.add_argument("--out", required=True, type=path, help="folder of the bundle")
    export_.add_argument(
        "--dtype", type=word, help="float32 (default), float16 or bfloat16; ONNX for the CPU has no bfloat16"
    )
    export_.add_argument(
        "--attention", type=word, help="auto (default), sdpa or flash, and for compile cudnn or flex; for onnx auto"
    )
    export_.add_argument("--device", type=word, help="cpu (default) or cuda")
    quantization_option(export_)
    weights_options(export_)
    export_.add_argument(
        "--verify", action="store_true", help="compare with eager float32 before the bundle is moved into place"
    )

    quantize_ = command("quantize", "Write a checkpoint in 8 or 4 bits, which loads as it is.")
    quantize_.add_argument("checkpoint", nargs="?", help="folder, file or repo id (default: the model that ships)")
    quantization_option(quantize_, required=True)
    quantize_.add_argument("--out", required=True, type=path, help="folder of the new checkpoint; absent or empty")
    weights_options(quantize_)

    convert_ = command("convert", "Write the autoencoder of a Lance checkpoint, a pickle, as safetensors.")
    convert_.add_argument("checkpoint", help="folder or repo id of the download, or its Wan2.2_VAE.pth")
    convert_.add_argument("--out", type=path, help="folder for the file (default: beside the pickle)")

    time_ = command("bench", "Time models side by side, each in a process of its own.")
    time_.add_argument("sources", nargs="*", help="checkpoint folders and bundles (default: the model that ships)")
    time_.add_argument(
        "--preset", choices=["h100", "lance"], help="BAGEL-7B's or Lance's sizes with random weights, on this GPU"
    )
    for kind in PRESET_BUNDLES:
        time_.add_argument(
            f"--{kind}",
            metavar="DIR",
            type=path,
            help=f"with --preset h100: also from an {kind} bundle that is exported to this folder (32 GB) or lies there",
        )
    time_.add_argument(
        "--quantization",
        type=word,
        metavar="KINDS",
        help="with --preset h100: also with quantised weights, with commas: fp8,int8,int4",
    )
    time_.add_argument(
        "--memory",
        type=word,
        metavar="SIZES",
        help="with --preset h100: also under caps of memory, with commas, as 24GB,16GB, in 16 bits and in each of --quantization",
    )
    time_.add_argument(
        "--backends", type=word, default="eager", help="for checkpoints, with commas: eager,compile (eager)"
    )
    time_.add_argument(
        "--export",
        type=word,
        metavar="PROFILE",
        action="append",
        help="also export each checkpoint for it (or for several) and time the bundles",
    )
    time_.add_argument("--formats", type=word, help="of the bundles, with commas: onnx,aoti,export,compile (onnx)")
    time_.add_argument(
        "--official", type=word, metavar="DIR", help="a checkout of the official code, timed first on the same weights"
    )
    time_.add_argument(
        "--official-python", type=word, default=sys.executable, help="Python with what the official code needs"
    )
    for name, value, text in (
        ("height", None, "pixels (the largest of the model, up to 1024)"),
        ("width", None, "pixels"),
        ("steps", 8, "timed flow steps per picture (8)"),
        ("tokens", 32, "timed tokens per answer (32)"),
        ("repeats", 3, "runs after the warm-up (3)"),
    ):
        time_.add_argument(f"--{name}", type=count, default=value, metavar="N", help=text)
    for name in ("device", "dtype", "profile"):
        time_.add_argument(f"--{name}", type=word, help="as for the other commands")
    time_.add_argument("--attention", type=word, default="auto", help="auto, sdpa, cudnn, flex or flash")
    time_.add_argument(
        "--gpus",
        type=count,
        metavar="N",
        help="how many each model has; with --preset h100: also time so many, in each way",
    )
    time_.add_argument("--json", type=path, metavar="FILE", help="also write all figures there")

    serve_ = command("serve", "Serve a model over HTTP, OpenAI-compatible, with a page to try it.")
    serve_options(serve_)

    check = command("doctor", "Say what runs by what on this machine, what is not used, why, and what to install.")
    check.add_argument("--json", action="store_true", help="the same facts as JSON")

    show = command("inspect", "Show what a checkpoint, a bundle or any file of weights holds, and what it would need.")
    show.add_argument("checkpoint", nargs="?", help="folder, file, repo id or bundle (default: the model that ships)")
    show.add_argument(
        "--profile", type=word, action="append", default=[], help="also the memory that this profile needs"
    )
    weights_options(show)
    show.add_argument("--dtype", choices=COMPUTE, help="to reckon that memory in (float32; with --memory bfloat16)")
    memory_option(show, "also what would lie where on a GPU of so much memory, as 12GB, and how long steps would take")
    quantization_option(show)
    check_option(show)
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
