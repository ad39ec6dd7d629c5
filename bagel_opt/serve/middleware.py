"""What every HTTP request passes: its id, the key, the limit of its body, one line in the log, one count."""

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_opt.serve.errors import ApiError, response
from bagel_opt.serve.metrics import Metrics

log = logging.getLogger("bagel_opt.serve.http")
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as extra={"fields": {...}}."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Gate:
    """ASGI middleware. keys: with any, paths under /v1 need one of them as bearer token."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], body_bytes: int, metrics: Metrics):
        self.app, self.keys, self.body_bytes, self.metrics = app, [key.encode() for key in keys], body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, began, status = Headers(scope=scope), time.perf_counter(), 499
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise self._too_large()
            return message

        try:
            if refusal := self._refuses(scope["path"], headers):
                await response(refusal)(scope, receive, answer)
            else:
                await self.app(scope, limited, answer)
        except Exception as error:  # of a program, or of this code; once an answer has begun it can only break off
            if status != 499:
                raise
            await response(error)(scope, receive, answer)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # a label for each path that clients invent would fill the memory
            self.metrics.responses.labels(path, status).inc()
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            fields["seconds"] = round(time.perf_counter() - began, 4)
            log.info("request", extra={"fields": fields})

    def _refuses(self, path: str, headers: Headers) -> ApiError | None:
        if self.keys and path.startswith("/v1/"):
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not sum(hmac.compare_digest(given, key) for key in self.keys):  # all of them: as long for any key
                return ApiError(401, "give a valid API key as bearer token", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return ApiError(400, "bad Content-Length")
        return self._too_large() if int(length) > self.body_bytes else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.body_bytes} bytes", code="body_too_large")
