"""The options of `bagel-opt serve`."""

import argparse

from bagel_opt.cli.argument_types import count, kept_apart, port, sizes, word
from bagel_opt.cli.model_arguments import load_options


def serve_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "checkpoint", nargs="?", help="bundle, checkpoint folder or repo id (default: the model that ships)"
    )
    load_options(sub, "demo for the model that ships; another checkpoint needs one")
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
    group.add_argument(
        "--host", type=word, default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)"
    )
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
        type=word,
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
