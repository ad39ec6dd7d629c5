"""From the options of `bagel-opt serve` to the settings of a server, on this machine or on a cluster."""

import argparse
import functools
import os
from collections import Counter
from pathlib import Path

from bagel_opt.cli.inspect import describe
from bagel_opt.cli.model_arguments import load_settings
from bagel_opt.cli.serve_arguments import serve_options
from bagel_opt.files.finding import find_bundle
from bagel_opt.loading import load
from bagel_opt.profile import profile_names

FLAGS = ("remote-images", "no-check")  # options without a value


def cluster_settings(options: dict[str, str]) -> dict:
    """Of bagel_opt.serve.replicas.application, from the options of `bagel-opt serve` by name. Raises ValueError and, for a
    value that no option takes, SystemExit."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    source = [given.pop("checkpoint")] if "checkpoint" in given else []
    arguments = []
    for name, value in given.items():
        if name not in FLAGS:
            arguments.append(f"--{name}={value}")
        elif str(value).lower() in ("true", "1", "yes"):
            arguments.append(f"--{name}")
        elif str(value).lower() not in ("false", "0", "no"):
            raise ValueError(f"{name}={value!r}; allowed are true and false")
    parser = argparse.ArgumentParser("bagel-opt serve")
    serve_options(parser)
    return replica_settings(parser.parse_args([*source, "--replicas=1", *arguments]))


def server_settings(a: argparse.Namespace) -> dict:
    """Of bagel_opt.serve.make_app, and the model's names."""
    from bagel_opt.serve import Limits
    from bagel_opt.serve.access import Access, allowed_hosts, split_keys

    keys, hosts = split_keys(a.api_key, os.environ.get("BAGEL_OPT_API_KEYS")), allowed_hosts(a.host, a.allowed_host)
    if a.checkpoint is None and a.profile is None:
        a.profile = "demo"
    if twice := {name for name, count in Counter(name for name, _ in a.adapters).items() if count > 1}:
        raise ValueError(f"--adapter has the name {min(twice)!r} twice")
    describe(
        a.checkpoint, check=a.check, weights=a.weights, lora=a.lora
    )  # what cannot be loaded should not cost starting a cluster
    if not a.profile and not find_bundle(a.checkpoint):
        raise ValueError(
            "--profile is missing: a server needs static shapes; profiles/ has " + ", ".join(profile_names())
        )
    return {
        "names": a.name or [Path(a.checkpoint).resolve().name if a.checkpoint else "bagel-demo"],
        "keys": keys,
        "hosts": hosts,
        "origins": Access(origins=tuple(a.cors_origin)).origins,  # checked before a model is loaded
        "limits": Limits(a.max_body * 2**20, a.max_pixels, a.max_images, a.max_n, a.max_timesteps),
        "max_queue": a.max_queue,
        "timeout": a.timeout,
        "remote": a.remote_images,
        "warm": a.warm,
    }


def _share_gpus(a: argparse.Namespace) -> None:
    """A replica's model computes on all GPUs that the replica has, and has those on which it computes."""
    on_gpus = not (a.device or "cuda").startswith("cpu")
    if a.gpus is None and (a.gpus_per_replica or 0) > 1:
        if a.gpus_per_replica % 1:
            raise ValueError(f"--gpus-per-replica {a.gpus_per_replica:g}: above 1, only whole numbers are allowed")
        a.gpus = int(a.gpus_per_replica)
    elif a.gpus and a.gpus_per_replica is None and on_gpus:
        a.gpus_per_replica = a.gpus
    elif a.gpus and on_gpus and a.gpus != a.gpus_per_replica:
        raise ValueError(
            f"--gpus {a.gpus} with --gpus-per-replica {a.gpus_per_replica:g}: give one of them, or the same number"
        )


def replica_settings(a: argparse.Namespace) -> dict:
    """Of bagel_opt.serve.replicas.application."""
    from bagel_opt.serve.replicas import Replicas

    settings = server_settings(a)
    _share_gpus(a)
    given = {"requests": a.requests_per_replica, "cpus": a.cpus_per_replica, "gpus": a.gpus_per_replica}
    given = {name: value for name, value in given.items() if value is not None}
    return {
        "load": functools.partial(load, a.checkpoint, profile=a.profile, **load_settings(a)),
        "replicas": Replicas(a.replicas, max(a.replicas, a.max_replicas or 1), **given),
        **settings,
    }
