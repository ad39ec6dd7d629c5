"""A request on its way to the engine: until when it counts, and what memory its body takes."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive

from bagel_opt.serve.budget import Budget

T = TypeVar("T")


class QueueFullError(Exception):
    """No room in the line. `retry_after`: seconds after which there should be."""

    def __init__(self, retry_after: int):
        super().__init__("too many requests are waiting; try again later")
        self.retry_after = retry_after


class DeadlineError(Exception):
    """The request was not done in time."""


class CancelledError(Exception):
    """The client gave the request up."""


class StalledError(Exception):
    """The body did not come in time."""


@dataclass
class Arrival:
    """timeout: seconds from its head until it is given up; began: of time.perf_counter()."""

    timeout: float
    began: float = field(default_factory=time.perf_counter)
    give_back: Callable[[], None] | None = None

    @property
    def deadline(self) -> float:
        return self.began + self.timeout

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises DeadlineError where it takes too long."""
        try:
            async with asyncio.timeout(self.deadline - time.perf_counter()):
                return await work
        except TimeoutError:
            raise DeadlineError(f"not done within {self.timeout:g} seconds") from None

    async def while_wanted(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The same, and CancelledError where the client goes; its body was read before."""
        working, gone = asyncio.ensure_future(self.within(work)), asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CancelledError("the client has gone")
            return working.result()
        finally:
            gone.cancel()
            working.cancel()

    async def take(self, budget: Budget, amount: int) -> None:
        """Waits for memory for its body. Raises DeadlineError."""
        await self.within(budget.take(amount))
        self.give_back = lambda: budget.give(amount)

    def release(self) -> None:
        """The body is no longer needed."""
        if self.give_back:
            self.give_back()
        self.give_back = None


async def until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
