"""An OpenAI-compatible HTTP server around the engine. `bagel-opt serve` runs it; it needs bagel-opt[serve]."""

import logging
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from bagel_opt.api import Model
from bagel_opt.serve.app import create_app
from bagel_opt.serve.engine_thread import EngineThread
from bagel_opt.serve.limits import Limits
from bagel_opt.serve.metrics import Metrics
from bagel_opt.serve.middleware import JsonLines
from bagel_opt.serve.service import Service

__all__ = ["EngineThread", "JsonLines", "Limits", "Metrics", "Service", "create_app", "make_app", "serve"]


def make_app(
    model: Model,
    name: str,
    *,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008  frozen
    max_queue: int = 64,
    timeout: float = 600,
    remote: bool = False,
) -> FastAPI:
    """The application of a model, with its engine. Logs JSON lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return create_app(Service(name, EngineThread(model, Metrics(), max_queue, timeout), limits, remote), keys)


def serve(model: Model, name: str, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> None:
    """Serves a model until SIGTERM or SIGINT, then finishes what runs and waits. settings: of make_app."""
    app = make_app(model, name, **settings)
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, server_header=False)
