"""An OpenAI-compatible HTTP server around the engine. `bagel-opt serve` runs it; it needs bagel-opt[serve]."""

import logging
from collections.abc import Sequence

import uvicorn

from bagel_opt.api import Model
from bagel_opt.serve.app import create_app
from bagel_opt.serve.engine import EngineThread
from bagel_opt.serve.gate import JsonLines
from bagel_opt.serve.limits import Limits
from bagel_opt.serve.metrics import Metrics
from bagel_opt.serve.service import Service

__all__ = ["EngineThread", "JsonLines", "Limits", "Metrics", "Service", "create_app", "serve"]


def serve(
    model: Model,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),  # noqa: B008  frozen
    max_queue: int = 64,
    timeout: float = 600,
    remote: bool = False,
) -> None:
    """Serves a model until SIGTERM or SIGINT, then finishes what runs and waits. Logs JSON lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    service = Service(name, EngineThread(model, Metrics(), max_queue, timeout), limits, remote)
    uvicorn.run(create_app(service, keys), host=host, port=port, log_config=None, access_log=False, server_header=False)
