"""What every HTTP request passes: its id, who may ask, the limits of its body, one line in the log, one count."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bagel_opt.serve.access import Access
from bagel_opt.serve.arrival import Arrival, StalledError
from bagel_opt.serve.errors import ApiError, response
from bagel_opt.serve.patience import STALL, patience
from bagel_opt.serve.service import Service

log = logging.getLogger("bagel_opt.serve.http")
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
SMALL = 2**16  # bytes of a body that need no leave


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service, access: Access):
        self.app, self.service, self.access, self.body_bytes = app, service, access, service.limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, status = Headers(scope=scope), 499
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        arrival = scope.setdefault("state", {})["arrival"] = Arrival(self.service.engine.timeout)
        scope["state"]["key"] = self.access.key(headers)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        read, whole, first = 0, False, 0.0

        async def limited() -> Message:
            nonlocal read, whole, first
            if whole:
                return await receive()
            first = first or time.perf_counter()
            try:
                async with asyncio.timeout(patience(read) - (time.perf_counter() - first)):
                    message = await arrival.within(receive())
            except TimeoutError:
                raise StalledError(f"the body did not go on for {STALL:g} seconds, or came too slowly") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body")
            if read > self.body_bytes:
                raise self._too_large()
            return message

        try:
            if refusal := self._refuses(scope["path"], headers):
                raise refusal
            if scope["method"] == "POST":
                self.service.engine.check_room()  # before a large body is read
                length = self._length(headers)
                if length > SMALL:
                    await arrival.take(self.service.bodies, length)
            await self.app(scope, limited, answer)
        except Exception as error:  # of a program, or of this code; once an answer has begun it can only break off
            if status != 499:
                raise
            await response(error)(scope, receive, answer)
        finally:
            arrival.release()
            route = scope.get("route")
            path = getattr(route, "path", "other")  # a label for each path that clients invent would fill the memory
            self.service.engine.metrics.responses.labels(path, status).inc()
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            fields["seconds"] = round(time.perf_counter() - arrival.began, 4)
            log.info("request", extra={"fields": fields})

    def _refuses(self, path: str, headers: Headers) -> ApiError | None:
        if not headers.get("content-length", "0").isdecimal():
            return ApiError(400, "bad Content-Length")
        return self.access.refuses(path, headers) or (
            self._too_large() if self._length(headers) > self.body_bytes else None
        )

    def _length(self, headers: Headers) -> int:
        """What a body may come to."""
        if "transfer-encoding" in headers:
            return self.body_bytes
        return int(headers.get("content-length", "0")[:20])

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.body_bytes} bytes", code="body_too_large")
