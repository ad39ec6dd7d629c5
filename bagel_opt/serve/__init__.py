"""An OpenAI-compatible HTTP server around the engine. `bagel-opt serve` runs it; it needs bagel-opt[serve]."""

import logging
import socket
import warnings
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from bagel_opt.api import Model
from bagel_opt.serve.access import Access, allowed_hosts
from bagel_opt.serve.app import create_app
from bagel_opt.serve.connections import Connection
from bagel_opt.serve.engine_thread import EngineThread
from bagel_opt.serve.limits import Limits
from bagel_opt.serve.links import Links
from bagel_opt.serve.logs import Bounded, JsonLines
from bagel_opt.serve.metrics import Metrics
from bagel_opt.serve.patience import STALL
from bagel_opt.serve.service import Service
from bagel_opt.serve.videos import Videos
from bagel_opt.serve.warm import warm_up

__all__ = [
    "Access",
    "EngineThread",
    "JsonLines",
    "Limits",
    "Metrics",
    "Service",
    "bind",
    "create_app",
    "log_as_json",
    "make_app",
    "serve",
]


def make_app(
    model: Model,
    names: Sequence[str],
    *,
    keys: Sequence[str] = (),
    hosts: frozenset[str] | None = None,
    origins: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008  frozen
    max_queue: int = 64,
    timeout: float = 600,
    remote: bool = False,
    keeps: bool = True,
    warm: Sequence[tuple[int, int]] = (),
) -> FastAPI:
    """The application of a model, with its engine. Logs JSON lines to stderr. names: what clients may call the model. keys,
    hosts, origins: of Access. keeps: whether this process keeps pictures and videos that are fetched later. warm: sizes
    (width, height) to run first."""
    access = Access(tuple(keys), hosts, tuple(map(str.lower, origins)))
    log_as_json()
    warm_up(model, warm)
    engine = EngineThread(model, Metrics(), max_queue, timeout)
    told = "; ".join(f"{name.replace('_', ' ')} {what}" for name, what in engine.facts.items())
    logging.getLogger("bagel_opt.serve").info("active: %s", told, extra={"fields": {"active": engine.facts}})
    kept = (Links(), Videos()) if keeps else (None, None)
    return create_app(Service(tuple(names), engine, limits, remote, *kept), access)


def log_as_json() -> None:
    """To stderr, unless this process has a log already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(Bounded())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Limits.pixels is what counts


def bind(host: str, port: int) -> socket.socket:
    """The socket to serve on, so that what is wrong with an address shows before a model is loaded. Raises OSError."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"cannot listen on {host}, port {port}: {why}; give another --host or --port") from None


def serve(
    model: Model,
    names: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    bound: socket.socket | None = None,
    **settings: Any,
) -> None:
    """Serves a model until SIGTERM or SIGINT, then finishes what runs and waits. bound: what `bind` made of host and port,
    if it was called before. settings: of make_app; hosts are by default those of a server on `host`."""
    settings.setdefault("hosts", allowed_hosts(host))
    app = make_app(model, names, **settings)
    shutdown = round(app.state.service.engine.timeout + 2 * STALL)
    options = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
    config = uvicorn.Config(app, http=Connection, timeout_graceful_shutdown=shutdown, **options)
    _Server(config).run(sockets=[bound or bind(host, port)])


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            logging.getLogger("bagel_opt.serve").info("bagel_opt running on %s", address)
