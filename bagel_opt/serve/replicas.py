"""Replicas of the engine on Ray Serve, each with a model of its own, behind one address. It needs bagel-opt[ray]."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.metrics import Gauge

from bagel_opt.api import Model
from bagel_opt.serve import make_app

NAME = "bagel_opt"


@dataclass(frozen=True)
class Replicas:
    """How many there are, and what each has. Between `least` and `most`, Ray keeps as many as let each have about
    `requests` running or waiting."""

    least: int = 1
    most: int = 1
    requests: int = 4
    cpus: float = 1
    gpus: float = 0


@serve.ingress()
class Replica:
    """One engine. load: makes its model, where it runs; settings: of make_app."""

    def __init__(self, load: Callable[[], Model], names: Sequence[str], settings: dict[str, Any]):
        self.served = make_app(load(), names, keeps=False, **settings)
        self.gauges: dict[str, Gauge] = {}

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.served

    def check_health(self) -> None:
        """Ray calls it every few seconds, and replaces a replica for which it raises. Passes the figures on to Ray's."""
        engine = self.served.state.service.engine
        for family in engine.metrics.registry.collect():
            for sample in family.samples:
                if sample.name not in self.gauges:
                    self.gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                self.gauges[sample.name].set(sample.value, sample.labels)
        if not engine.ready:
            raise RuntimeError("the device failed repeatedly")


def application(
    load: Callable[[], Model], names: Sequence[str], replicas: Replicas, **settings: Any
) -> serve.Application:
    """What `serve.run` takes. settings: of make_app."""
    if replicas.most > replicas.least:
        count = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.requests,
            }
        }
    else:
        count = {"num_replicas": replicas.least}
    deployment = serve.deployment(
        name=NAME,
        # also what streams hold; beyond, Ray's proxy keeps them waiting, and the engine answers 429 for what it has
        max_ongoing_requests=2 * settings["max_queue"],
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        graceful_shutdown_timeout_s=settings["timeout"],
        **count,
    )(Replica)
    return deployment.bind(load, names, settings)


def serve_replicas(
    load: Callable[[], Model], names: Sequence[str], replicas: Replicas, host: str, port: int, **settings: Any
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs. Starts Ray on this machine, or joins the cluster that
    RAY_ADDRESS names. Raises RuntimeError where a replica does not start."""
    ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(application(load, names, replicas, **settings), name=NAME)  # returns when all answer
        except RuntimeError:
            why = serve.status().applications[NAME].deployments[NAME].message.strip().splitlines()[-1]
            raise RuntimeError(f"no replica starts: {why}") from None
        over = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own before
            signal.signal(number, lambda *_: over.set())
        over.wait()
    finally:
        stopping = threading.Thread(target=_stop, daemon=True)
        stopping.start()
        stopping.join(settings["timeout"] + 60)
        if stopping.is_alive():  # it waits for parts of Ray that were killed too
            os._exit(1)


def _stop() -> None:
    """Replicas finish what they have, while the proxy still passes it on; then all ends."""
    serve.delete(NAME)
    serve.shutdown()
    ray.shutdown()
