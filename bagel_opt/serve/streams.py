"""Answers on the wire: event streams, text as it grows, pictures in base64."""

import asyncio
import base64
import functools
import io
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from bagel_opt.sampling.stops import before_stops
from bagel_opt.serve import errors
from bagel_opt.serve.engine_thread import Ticket
from bagel_opt.serve.service import Service
from bagel_opt.tokenizer import Tokenizer

ENCODERS = ThreadPoolExecutor(2, "encoder")  # of their own: names that take long to look up fill asyncio's
KEEP_ALIVE = 15  # seconds without an event after which a stream sends a comment, so that no proxy gives it up


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
    return base64.b64encode(await filed(picture, file_format, quality)).decode()


async def filed(picture: Image.Image, file_format: str, quality: int | None) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    options = {"quality": quality} if quality is not None and file_format != "png" else {}
    save = functools.partial(picture.save, buffer, file_format, **options)
    await asyncio.get_running_loop().run_in_executor(ENCODERS, save)
    return buffer.getvalue()


class TextStream:
    """Turns token ids into the text that each adds. Held back are bytes of a character that is not whole yet, and what may
    be the beginning of a text at which writing stops."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids, self.sent = [tokenizer.special.bos_token_id], ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        text = before_stops(self.tokenizer.decode(self.ids).rstrip("\ufffd"), self.stops)
        held = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        return self.until(text[: len(text) - held])

    def whole(self) -> str:
        """The text, once no more comes."""
        return before_stops(self.tokenizer.decode(self.ids), self.stops)

    def until(self, text: str) -> str:
        """What is missing of `text`."""
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new
