"""What all endpoints share: from checked requests to tickets, and from tickets to answers or event streams."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from bagel_opt.errors import shown
from bagel_opt.images import InputImage
from bagel_opt.request import Request
from bagel_opt.sampling.plan import AnyPlan
from bagel_opt.serve import errors
from bagel_opt.serve.arrival import until_gone
from bagel_opt.serve.budget import Budget
from bagel_opt.serve.engine_thread import EngineThread, Ticket
from bagel_opt.serve.fetch import fetch
from bagel_opt.serve.limits import Limits
from bagel_opt.serve.links import Links
from bagel_opt.serve.pictures import decode_data_url, decode_picture, decode_video
from bagel_opt.serve.videos import Videos
from bagel_opt.videos import Video

FETCHES = 8  # requests that have pictures fetched at a time
PLANNERS = 2  # threads that plan requests; each has one picture decoded at a time
STUCK = 60.0  # seconds that planning one request should never take


@dataclass
class Source:
    """A picture that a client sent, or where it is. data: a file, or a data URL as it stands in JSON; param: the field."""

    param: str
    data: "bytes | memoryview | None" = None
    data_url: bool = False
    address: str | None = None


@dataclass
class Work:
    """What a body asks of the engine. make: from its pictures to `count` requests; kind: for the metrics; reading: options
    with which pictures are read; inputs: the body's field of what goes in; longest: tokens that a text may have, or fewer
    where there is no room for so many; spelled: the body's fields of options that have another name; progress,
    partial_images: of a stream; videos: whether sources may be some; admit: raises ApiError or QueueFullError for a plan that
    is not to run."""

    sources: list[Source]
    make: Callable[[list[InputImage | Video]], list[Request]]
    kind: str
    reading: dict
    inputs: str
    count: int = 1
    longest: int | None = None
    spelled: dict[str, str] = field(default_factory=dict)
    progress: bool = False
    partial_images: int = 0
    videos: bool = False
    admit: Callable[[AnyPlan], None] = lambda plan: None


@dataclass(frozen=True)
class Service:
    """names: the model's, as /v1/models lists them. remote: whether pictures may be fetched from public addresses. links:
    for pictures that an answer has an address of, and videos: those that are made; None where another process might be asked for
    them."""

    names: tuple[str, ...]
    engine: EngineThread
    limits: Limits
    remote: bool = False
    links: Links | None = field(default_factory=Links)
    videos: Videos | None = field(default_factory=Videos)
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FETCHES))
    planners: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PLANNERS, "planner"))
    planning: dict[object, float] = field(default_factory=dict)  # since when each thread has had its request
    bodies: Budget = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "bodies", Budget(self.limits.bodies_bytes))

    def check_model(self, model: str | None) -> str:
        """-> the name under which it answers"""
        if model is not None and model not in self.names:
            message = f"the model {shown(model)!r:.80} does not exist; there is {', '.join(map(repr, self.names))}"
            raise errors.ApiError(404, message, "model", "model_not_found")
        return model or self.names[0]

    def status(self) -> str:
        """ "ready", or why it is not."""
        if not self.engine.ready:
            return "failing"
        now = time.monotonic()
        return "stuck" if any(now - since > STUCK for since in list(self.planning.values())) else "ready"

    def close(self) -> None:
        """Finishes what runs and waits."""
        self.planners.shutdown(cancel_futures=True)
        self.engine.close()

    def source(self, url: str, param: str, pictures: Mapping[str, memoryview]) -> Source:
        """A picture in a data URL or, where that is allowed, at an address. pictures: data URLs that were cut out."""
        if url in pictures or url[:5].lower() == "data:" or not self.remote:
            return Source(param, pictures.get(url, url.encode()), data_url=True)
        return Source(param, address=url)

    async def submit(self, http: HttpRequest, work: Work) -> list[Ticket]:
        """Reads the pictures, plans the requests in a thread and puts them in line; the sources are gone then. Raises
        ApiError, and QueueFullError, DeadlineError or CancelledError as the body's reading does."""
        arrival = http.state.arrival
        with self.engine.room(work.count):
            planned = await arrival.while_wanted(http.receive, self._plan(work))
            arrival.release()
            for plan, _ in planned:
                work.admit(plan)
            return self.engine.submit(planned, work.kind, arrival, work.progress, work.partial_images)

    async def _plan(self, work: Work) -> list:
        remote = any(source.address for source in work.sources)
        async with self.fetching if remote else contextlib.nullcontext():
            left = self.limits.body_bytes
            for source in work.sources:
                if source.address:
                    source.data = await self._fetched(source, left)
                    left -= len(source.data)
            return await asyncio.get_running_loop().run_in_executor(self.planners, self._plan_now, work)

    async def _fetched(self, source: Source, most: int) -> bytes:
        try:
            return await fetch(source.address, most)
        except ValueError as error:
            message = f"{source.param}: the picture's address: {error}"
            raise errors.ApiError(400, message, source.param) from None

    def _plan_now(self, work: Work) -> list:
        pictures, key = [], object()
        self.planning[key] = time.monotonic()
        try:
            while work.sources:
                pictures.append(self._read(work.sources.pop(0), work))
            return [self.engine.plan(request, work.longest) for request in work.make(pictures)]
        except ValueError as error:
            spelled = {**dict.fromkeys(("inputs", "video"), work.inputs), **work.spelled}
            raise errors.refused(error, spelled) from None
        finally:
            del self.planning[key]

    def _read(self, source: Source, work: Work) -> InputImage | Video:
        data = decode_data_url(source.data, source.param) if source.data_url else source.data
        source.data = None
        if work.videos and (video := decode_video(data, source.param)):
            return video
        try:
            return self.engine.read(decode_picture(data, self.limits, source.param), source.param, work.reading)
        except ValueError as error:
            raise errors.ApiError(400, str(error), source.param) from None

    async def results(self, http: HttpRequest, tickets: list[Ticket]) -> list[list]:
        """The outputs of all; the first failure, or the client's leaving, ends the others."""
        async with self.watched(http.receive, tickets):
            return await asyncio.gather(*(ticket.result() for ticket in tickets))

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive, tickets: list[Ticket]) -> AsyncIterator[None]:
        """Cancels what is not done when the client goes, or when the block is left."""

        async def watch() -> None:
            await until_gone(receive)
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


def input_tokens(plan: AnyPlan) -> tuple[int, int]:
    """Slots that a request's texts and its pictures take."""
    text = sum(block.length for block in plan.main if block.kind == "text")
    return text, sum(block.length for block in plan.main) - text


def token_counts(ticket: Ticket) -> tuple[int, int, int]:
    """Of a request that is done: tokens that went in, that came out, and of those the texts'."""
    side = ticket.engine.config.token_pixels
    pictures = [output for output in ticket.outputs if not isinstance(output, str)]
    sizes = [(p.height // side) * (p.width // side) for p in pictures]
    written = len(ticket.tokens)
    return (
        sum(input_tokens(ticket.plan)),
        written + (ticket.plan.canvas.tokens if ticket.plan.resized else sum(sizes)),
        written,
    )


def was_cut(ticket: Ticket) -> bool:
    """Whether the last output is a text that had no room to end."""
    written = len(ticket.tokens) - ticket.parted[-2 if len(ticket.parted) > 1 else -1]
    return isinstance(ticket.outputs[-1], str) and written == ticket.plan.max_tokens - 1
