"""What all endpoints share: from checked requests to tickets, and from tickets to answers or event streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from bagel_opt.request import Request
from bagel_opt.sampling.plan import Plan
from bagel_opt.serve import errors
from bagel_opt.serve.engine_thread import EngineThread, Ticket
from bagel_opt.serve.limits import Limits


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


def input_tokens(plan: Plan) -> tuple[int, int]:
    """Slots that a request's texts and its pictures take."""
    text = sum(block.length for block in plan.main if block.kind == "text")
    return text, sum(block.length for block in plan.main) - text
