"""The command line's options of a model, as `load` takes them."""

import argparse

from bagel_opt.cli.argument_types import adapter, count, parallel, quantization, word
from bagel_opt.loading import BACKENDS


def model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", type=word, help="checkpoint folder, repo id or bundle (default: the model that ships)"
    )
    load_options(sub)


def load_options(sub: argparse.ArgumentParser, profile: str = "shapes fitted to the request") -> None:
    group = sub.add_argument_group("model")
    group.add_argument(
        "--backend", type=word, default="eager", help=f"{' or '.join(BACKENDS)}; a bundle brings its own"
    )
    group.add_argument("--device", type=word, help="cpu, cuda or cuda:N")
    group.add_argument("--dtype", type=word, help="float32, bfloat16 or float16")
    group.add_argument("--attention", type=word, default="auto", help="auto, sdpa, cudnn, flex or flash")
    group.add_argument("--profile", type=word, help=f"profile file or name; default: {profile}")
    quantization_option(group)
    memory_option(
        group, "what a GPU may be filled with, as 12GB; weights beyond that stream in from the host (all of it)"
    )
    gpus_options(group)
    weights_options(group)
    check_option(group)


def memory_option(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument("--memory", type=word, metavar="SIZE", help=text)


def gpus_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--gpus", type=count, metavar="N", help="how many compute each request together (1)")
    group.add_argument(
        "--parallel",
        type=parallel,
        default="auto",
        metavar="WAY",
        help="what they share out: guidance, sequence, tensor, several with ranks of each, as guidance=2,sequence=2, or auto",
    )


def weights_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--weights", type=word, metavar="FILE", help="a fine-tune's file, folder or repo id over the checkpoint"
    )
    group.add_argument(
        "--lora",
        metavar="FILE[=FACTOR]",
        action="append",
        type=adapter,
        default=[],
        help="an adapter's file or folder, as peft writes them; may be given several times",
    )


def quantization_option(group: argparse._ActionsContainer, required: bool = False) -> None:
    group.add_argument(
        "--quantization",
        metavar="KIND",
        type=quantization,
        required=required,
        help="fp8, int8 or int4: weights of both experts in 8 or 4 bits; or by part, as gen=fp8,und=int4,vit=int8,head=int8,"
        "embeddings=int8",
    )


def check_option(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare a huge bundle's files with their sha256"
    )


def load_settings(a: argparse.Namespace) -> dict:
    """Of bagel_opt.load, besides the source and the profile."""
    names = ("backend", "device", "dtype", "attention", "weights", "lora", "quantization", "memory")
    names += ("gpus", "parallel", "check")
    return {name: getattr(a, name) for name in names} | {"adapters": dict(vars(a).get("adapters", ()))}
