"""The one thread that owns the model: requests come in through a bounded line and report back to the event loop."""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from bagel_opt import __version__
from bagel_opt.api import Model
from bagel_opt.errors import ProfileError
from bagel_opt.images import InputImage, check_image
from bagel_opt.options import Options, StepEvent
from bagel_opt.request import Request
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.job import Job, Observer
from bagel_opt.sampling.pictures import read_image
from bagel_opt.sampling.plan import AnyPlan, fits
from bagel_opt.sampling.planning import make_plan
from bagel_opt.serve.arrival import Arrival, CancelledError, DeadlineError, QueueFullError
from bagel_opt.serve.metrics import Metrics

FAILURES = 3  # device failures in a row after which the server is no longer ready
log = logging.getLogger("bagel_opt.serve")


@dataclass(frozen=True)
class Step:
    """A flow step was made. `picture`: what the picture would be if the flow went on straight, where it was asked for."""

    index: int
    total: int
    picture: Any = None
    round: int = 0


@dataclass(frozen=True)
class Decoded:
    """A part of a video was decoded."""

    index: int
    total: int


@dataclass(frozen=True)
class Part:
    """A text or a picture of an interleaved answer is whole."""

    output: str | Image.Image


@dataclass(eq=False)
class Ticket:
    """A request in the engine, as the event loop sees it: an async iterator of Steps, of what is Decoded, of token ids and Parts,
    then `outputs`."""

    plan: AnyPlan
    engine: Engine
    kind: str
    arrival: Arrival
    loop: asyncio.AbstractEventLoop
    progress: bool  # whether flow steps are reported, and parts of a video
    previews: frozenset[int]  # the steps after which a partial picture is made
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    parted: list[int] = field(default_factory=lambda: [0])  # how many tokens there were as each part ended
    outputs: list | Exception | None = None
    job: Job | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture to answer with, in pixels."""
        return self.plan.resized or self.plan.canvas.size

    @property
    def begun(self) -> bool:
        """Whether it has rows, or had them."""
        return self.job is not None and bool(self.job.contexts)

    def post(self, event: Any) -> None:
        """From the engine's thread. What a slow reader leaves lying is bounded by the steps of its request."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Step | Decoded | Part | int]:
        while (event := await self.events.get()) is not None:
            yield event
        if isinstance(self.outputs, Exception):
            raise self.outputs

    async def result(self) -> list:
        """The outputs; raises what the request failed of."""
        async for _ in self:
            pass
        return self.outputs


class EngineThread:
    """Runs all requests of a server, each in the smallest profile that it fits.

    max_queue: requests that may be planned, wait or run at a time. timeout: seconds until a request is given up.
    Raises ValueError for a model without static profiles.
    """

    def __init__(self, model: Model, metrics: Metrics, max_queue: int = 64, timeout: float = 600):
        if not model.profiles:
            raise ValueError("serving needs static shapes: give --profile, or a bundle, which brings its own")
        self.model, self.metrics, self.max_queue, self.timeout = model, metrics, max_queue, timeout
        self.engines = {profile: self._engine(profile) for profile in model.profiles}
        self.tickets: set[Ticket] = set()  # of the event loop
        self.planned = 0  # requests that are being planned; of the event loop
        self.running: dict[Job, Ticket] = {}  # of the engine's thread
        self.commands: queue.SimpleQueue = queue.SimpleQueue()
        self.failures = 0  # of the device, in a row
        self.seconds = 1.0  # moving average between two requests that end
        self.last_end = time.perf_counter()
        self.facts = {"version": __version__, **model.runtime.active()}
        metrics.info.info(self.facts)
        metrics.measure(self.engines.values())
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def ready(self) -> bool:
        return self.thread.is_alive() and self.failures < FAILURES

    def close(self) -> None:
        """Finishes what runs and waits, then ends the thread."""
        self.commands.put(None)
        self.thread.join()

    # ---- the event loop's side

    def plan(self, request: Request, longest: int | None = None) -> tuple[AnyPlan, Engine]:
        """Checks a request; a ValueError says what is wrong with it. Takes a while: not for the event loop.

        An answer whose length was not asked for gets the room that a picture in progress beside it leaves. longest: tokens
        that it may have, which is no such wish.
        """
        plan = make_plan(request, self.model.config, self.model.tokenizer)
        if longest is not None:
            free = dataclasses.replace(plan.options, max_think_tokens=None)
            most = min(longest, max(profile.slots for profile in self.model.profiles))
            plan = dataclasses.replace(plan, options=free, max_tokens=most + 1)  # which counts the start token too
        profile, fitted = self.model.choose(plan)
        beside = dataclasses.replace(profile, slots=max(1, profile.slots - profile.latents - 2))
        return plan.fitted(beside) if fits(plan, beside) else fitted, self.engines[profile]

    def read(self, image: Image.Image, where: str, options: dict) -> InputImage | Image.Image:
        """A picture as small as the model reads it with these options; a ValueError says what is wrong with it. Not for the
        event loop. What Lance reads depends on the task, so there it is the picture itself."""
        check_image(image, where)
        config = self.model.config
        if config.family != "bagel":
            return image
        return read_image(image, config.reading(Options.make({**config.generation, **options})), where)

    def check_room(self, requests: int = 1) -> None:
        """Raises QueueFullError."""
        taken = len(self.tickets) + self.planned
        if taken + requests > self.max_queue:
            self.metrics.rejected.inc()
            raise QueueFullError(min(60, max(1, round(self.seconds * taken / 2))))

    @contextlib.contextmanager
    def room(self, requests: int) -> Iterator[None]:
        """Places in the line for requests that are being planned; `submit` is called within. Raises QueueFullError."""
        self.check_room(requests)
        self.planned += requests
        try:
            yield
        finally:
            self.planned -= requests

    def submit(
        self,
        planned: list[tuple[AnyPlan, Engine]],
        kind: str,
        arrival: Arrival,
        progress: bool = False,
        partial_images: int = 0,
    ) -> list[Ticket]:
        loop, tickets = asyncio.get_running_loop(), []
        for plan, engine in planned:
            steps = len(plan.steps)
            previews = {-(-steps * (i + 1) // (partial_images + 1)) - 1 for i in range(partial_images)}
            tickets.append(Ticket(plan, engine, kind, arrival, loop, progress, frozenset(previews)))
        self.tickets.update(tickets)
        for ticket in tickets:
            self.commands.put(("submit", ticket))
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """Their rows are free at the next step."""
        for ticket in tickets:
            if ticket in self.tickets:
                self.commands.put(("cancel", ticket))

    # ---- the engine's thread

    def _engine(self, profile: Any) -> Engine:
        return Engine(self.model.runtime.for_profile(profile), self.model.config, self.model.tokenizer, profile)

    def _run(self) -> None:
        closing = False
        while not (closing and not self.running):
            closing = self._obey() or closing
            self._expire()
            for engine in self.engines.values():
                if engine.waiting or engine.active:
                    self._step(engine)
            self.metrics.measure(self.engines.values())
        for engine in self.engines.values():
            engine.batches.close()

    def _obey(self) -> bool:
        """Takes all commands, waiting for one where there is nothing else to do. -> whether to close"""
        closing, block = False, not self.running
        while True:
            try:
                command = self.commands.get(block=block)
            except queue.Empty:
                return closing
            block = False
            if command is None:
                closing = True
            elif command[0] == "submit":
                self._start(command[1])
            elif command[1].job in self.running:
                self._give_up(command[1], CancelledError("the client has gone"))

    def _start(self, ticket: Ticket) -> None:
        if not self.running:
            self.last_end = time.perf_counter()

        def on_step(event: StepEvent) -> None:
            picture = None
            if event.index in ticket.previews:
                x_t, v_t = np.asarray(event.x_t), np.asarray(event.v_t)
                picture = ticket.job.picture(x_t - np.float32(event.t) * v_t)
            ticket.post(Step(event.index, event.total, picture, event.round))

        def on_token(token: int) -> None:
            self.metrics.tokens.inc()
            ticket.tokens.append(token)
            ticket.post(token)

        def on_output(output: str | Image.Image) -> None:
            ticket.parted.append(len(ticket.tokens))
            ticket.post(Part(output))

        def on_decoded(index: int, total: int) -> None:
            ticket.post(Decoded(index, total))

        parts = on_output if ticket.plan.options.output == "interleaved" else None
        steps, decoded = (on_step, on_decoded) if ticket.progress else (None, None)
        observer = Observer(steps, on_token, parts, on_decoded=decoded)
        ticket.job = ticket.engine.submit(ticket.plan, observer)
        self.running[ticket.job] = ticket

    def _step(self, engine: Engine) -> None:
        began = time.perf_counter()
        try:
            ended = engine.step()
        except Exception as error:  # a fault of the engine itself: all its requests fail, and it starts afresh
            log.exception("the engine failed")
            ended = engine.restart(error)
        self.metrics.step_seconds.observe(time.perf_counter() - began)
        for job in ended:
            self._done(job)

    def _done(self, job: Job) -> None:
        now = time.perf_counter()
        self.seconds, self.last_end = 0.8 * self.seconds + 0.2 * min(now - self.last_end, 60), now
        if not isinstance(job.result, Exception):
            self.failures = 0
        elif isinstance(job.result, ChildProcessError):  # of several GPUs one is lost, and this model with it
            self.failures = FAILURES
        elif not isinstance(
            job.result, ProfileError | FloatingPointError | MemoryError
        ):  # those are the request's own fault
            self.failures += 1
        self._tell(job, job.result)

    def _expire(self) -> None:
        now = time.perf_counter()
        for ticket in [ticket for ticket in self.running.values() if ticket.arrival.deadline < now]:
            self._give_up(ticket, DeadlineError(f"not done within {self.timeout:g} seconds"))

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        ticket.engine.cancel(ticket.job)
        self._tell(ticket.job, error)

    def _tell(self, job: Job, outputs: list | Exception) -> None:
        ticket = self.running.pop(job)
        ticket.outputs = outputs
        self.metrics.ended(ticket.kind, outputs, time.perf_counter() - ticket.arrival.began)
        ticket.loop.call_soon_threadsafe(self.tickets.discard, ticket)
        ticket.post(None)
