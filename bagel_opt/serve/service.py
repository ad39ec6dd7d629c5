"""What all endpoints share: from checked requests to tickets, and from tickets to answers or event streams."""

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from bagel_opt.request import Request
from bagel_opt.sampling.plan import Plan
from bagel_opt.serve import errors
from bagel_opt.serve.engine import EngineThread, Ticket
from bagel_opt.serve.limits import Limits
from bagel_opt.tokenizer import Tokenizer

KEEP_ALIVE = 15  # seconds without an event after which a stream sends a comment, so that no proxy gives it up


@dataclass(frozen=True)
class Service:
    """name: the model's, as /v1/models lists it. remote: whether pictures may be fetched from public addresses."""

    name: str
    engine: EngineThread
    limits: Limits
    remote: bool = False
    planning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))  # pictures take much memory

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            message = f"the model {model!r} does not exist; there is {self.name!r}"
            raise errors.ApiError(404, message, "model", "model_not_found")

    async def submit(
        self, make: Callable[[], list[Request]], kind: str, progress: bool = False, partial_images: int = 0
    ) -> list[Ticket]:
        """Makes requests and plans them in a thread, then puts them in line. Raises ApiError and QueueFullError."""

        def plan() -> list:
            try:
                return [self.engine.plan(request) for request in make()]
            except ValueError as error:
                raise errors.refused(error) from None

        self.engine.check_room()
        async with self.planning:
            planned = await asyncio.to_thread(plan)
        return self.engine.submit(planned, kind, progress, partial_images)

    async def results(self, http: HttpRequest, tickets: list[Ticket]) -> list[list]:
        """The outputs of all; the first failure, or the client's leaving, ends the others."""
        async with self.watched(http.receive, tickets):
            return await asyncio.gather(*(ticket.result() for ticket in tickets))

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive, tickets: list[Ticket]) -> AsyncIterator[None]:
        """Cancels what is not done when the client goes, or when the block is left."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.engine.cancel(tickets)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            self.engine.cancel(tickets)


def _service(http: HttpRequest) -> Service:
    return http.app.state.service


Injected = Annotated[Service, Depends(_service)]


class EventStream(StreamingResponse):
    """Server-sent events of one ticket. A failure on the way becomes the last event."""

    def __init__(self, service: Service, ticket: Ticket, events: AsyncIterator[str]):
        super().__init__(self._guarded(events), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.service, self.ticket = service, ticket

    async def _guarded(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        coming = asyncio.ensure_future(anext(events))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=KEEP_ALIVE)
                if not done:
                    yield ": waiting\n\n"
                    continue
                yield coming.result()
                coming = asyncio.ensure_future(anext(events))
        except StopAsyncIteration:
            pass
        except Exception as error:
            yield sse(errors.body(errors.as_api_error(error)), "error")
        finally:
            coming.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.service.watched(receive, [self.ticket]):
            await super().__call__(scope, receive, send)


def sse(data: Any, event: str | None = None) -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def encoded(picture: Image.Image, file_format: str = "png", quality: int | None = None) -> str:
    """A picture's file in base64."""
    buffer = io.BytesIO()
    options = {"quality": quality} if quality is not None and file_format != "png" else {}
    await asyncio.to_thread(picture.save, buffer, file_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


class TextStream:
    """Turns token ids into the text that each adds. Bytes of a character that is not whole yet are held back."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.sent = tokenizer, [tokenizer.special.bos_token_id], ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self.until(self.tokenizer.decode(self.ids).rstrip("\ufffd"))

    def until(self, text: str) -> str:
        """What is missing of `text`."""
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new


def input_tokens(plan: Plan) -> tuple[int, int]:
    """Slots that a request's texts and its pictures take."""
    text = sum(block.length for block in plan.main if block.kind == "text")
    return text, sum(block.length for block in plan.main) - text
