"""One sampling loop for every runtime: requests as coroutines over common static rows.

A request runs by itself until it needs a token or a velocity; the engine then serves all requests that wait for the
same in one call per batch. Between programs a request is nothing but lengths: which rows it has, how many slots of
them are valid, which position comes next.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bagel_opt.config import BagelConfig
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import Runtime, Tensor
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.decoding import Decoder
from bagel_opt.sampling.flow import FlowStep
from bagel_opt.sampling.flow_rows import FlowRows
from bagel_opt.sampling.job import Job, Observer, Token
from bagel_opt.sampling.plan import AnyPlan, slots_together
from bagel_opt.sampling.reading import Reading, Texts
from bagel_opt.sampling.step_caches import STEP_CACHES, StepCache
from bagel_opt.sampling.velocities import Velocities
from bagel_opt.tokenizer import Tokenizer

PAUSE = 0.25  # seconds for which pictures are read while others wait for a text of theirs or to write
PATIENCE = 8  # how many may pass a request that waits for more rows than are free
log = logging.getLogger("bagel_opt")


class Engine:
    """Serves requests that come and go between its steps, in rows that they share."""

    def __init__(self, runtime: Runtime, config: BagelConfig, tokenizer: Tokenizer, profile: Profile):
        self.runtime, self.config, self.tokenizer, self.profile = runtime, config, tokenizer, profile
        self.flow_seconds = 0.0  # what the last flow step took
        self.turns = itertools.count(1)
        self._start()

    def _start(self) -> None:
        """No request, and batches without memory."""
        self.batches = Batches(self.runtime, self.config, self.profile)
        self.texts, self.decoder, self.velocities = Texts(self.batches), Decoder(self.batches), Velocities(self.batches)
        self.step_caches: dict[str, StepCache] = {name: make(self.batches) for name, make in STEP_CACHES.items()}
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.finished: list[Job] = []

    def restart(self, error: Exception) -> list[Job]:
        """Hands the memory back and starts afresh, after a fault of its own, of which all requests on their way end.
        -> the requests that ended, those included that had just been done"""
        ended = [*self.finished, *self.active, *self.waiting]
        for job in ended[len(self.finished) :]:
            job.work.close()
            job.result = error
        try:
            self.batches.close()
        except Exception:  # of a device that failed
            log.exception("caches could not be handed back")
        self._start()
        return ended

    def run(self, plans: list[AnyPlan], observers: Sequence[Observer | None] = ()) -> list[list | Exception]:
        """The outputs of each request, in order; the exception in place of a request that failed by itself. The engine
        is used up."""
        jobs = [self.submit(*one) for one in itertools.zip_longest(plans, observers)]
        try:
            while self.waiting or self.active:
                self.step()
        finally:
            self.batches.close()
        return [job.result for job in jobs]

    def submit(self, plan: AnyPlan, observer: Observer | None = None) -> Job:
        """Puts a request in line; it joins in the first step with room for it. observer: by default what its options name."""
        own = plan.options
        observer = observer or Observer(own.on_step, own.on_token, own.on_output)
        job = Job(plan, self.batches, self.tokenizer, observer)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request between two steps, without a result; its rows are free at once."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.active:
            job.work.close()
            self._leave(job)

    def step(self) -> list[Job]:
        """One round: one program for each request that still reads, texts of all together, tokens for all that write, and
        one flow step for all that draw. Pictures are read in turn, in the order of requests, and while others could write, no
        longer than PAUSE. While some write and some draw, each side gets half of the time. -> the requests that ended"""
        self._admit()
        began = time.perf_counter()
        for job in sorted((job for job in self.active if job.want is None), key=lambda job: job.turn):
            job.turn = next(self.turns)
            self._advance(job)
            if time.perf_counter() - began > PAUSE and (self._waiting_for(Reading) or self._waiting_for(Token)):
                break
        if jobs := self._waiting_for(Reading):
            self._serve(jobs, self._read)
        began = time.perf_counter()
        while jobs := self._waiting_for(Token):
            self._serve(jobs, self._decode)
            if not self._waiting_for(FlowStep) or time.perf_counter() - began > self.flow_seconds:
                break
        if jobs := self._waiting_for(FlowStep):
            began = time.perf_counter()
            self._serve(jobs, self._denoise)
            self.flow_seconds = time.perf_counter() - began
        ended, self.finished = self.finished, []
        return ended

    # ---- requests coming and going

    def _waiting_for(self, kind: type) -> list[Job]:
        return [job for job in self.active if isinstance(job.want, kind)]

    def _admit(self) -> None:
        """Gives rows to those in line. A later request that fits may pass one that does not, but not for ever."""
        passed: list[Job] = []
        for job in list(self.waiting):
            if self._admits(job.plan):
                self.waiting.remove(job)
                self.active.append(job)
                job.take_rows()
                for other in passed:
                    other.passed += 1
            else:
                passed.append(job)
                if job.passed >= PATIENCE:
                    return

    def _admits(self, plan: AnyPlan) -> bool:
        if not self.active:
            return True
        slots = slots_together([plan, *(job.plan for job in self.active)], self.profile)
        return plan.contexts() <= len(self.batches.free) and slots <= self.profile.slots

    def _advance(self, job: Job, value: Any = None) -> None:
        """Runs a request until it wants something; a failure of its own ends it alone."""
        try:
            job.want = job.work.send(value)
        except StopIteration as done:
            self._end(job, done.value)
        except Exception as error:
            self._end(job, error)

    def _end(self, job: Job, result: list | Exception) -> None:
        job.result = result
        self.finished.append(job)
        self._leave(job)

    def _leave(self, job: Job) -> None:
        self.active.remove(job)
        self.batches.release(job.contexts)
        job.encoded.clear()

    def _serve(self, jobs: list[Job], program: Callable[[list[Job]], list]) -> None:
        try:
            answers = program(jobs)
        except Exception as error:
            for job in jobs:
                self._end(job, error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                if isinstance(answer, Exception):
                    self._end(job, answer)
                else:
                    self._advance(job, answer)

    # ---- all requests that wait for the same

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """kv_len and position of every row of all batches. A row that takes no part is written after what it holds."""
        kv_len = np.zeros(self.profile.batches * self.profile.rows, np.int64)
        position = np.zeros_like(kv_len)
        for job in self.active:
            for c in job.contexts:
                kv_len[self.batches.at(c)], position[self.batches.at(c)] = c.kv_len, c.position
        return kv_len, position

    def _read(self, jobs: list[Job]) -> list[MemoryError | None]:
        """A text of each of these requests."""
        return self.texts([job.want for job in jobs])

    def _decode(self, jobs: list[Job]) -> list[int | MemoryError]:
        """The next token of each of these requests."""
        return self.decoder(jobs, *self._lengths())

    def _denoise(self, jobs: list[Job]) -> list[tuple[np.ndarray, np.ndarray] | MemoryError | None]:
        """One flow step of each of these requests; (x_t, v_t) for those that watch."""
        rows = FlowRows(self.batches, self._lengths()[0])
        for job in jobs:
            rows.add(job)
        acting = []
        for name, cache in self.step_caches.items():
            if users := [job for job in jobs if job.plan.options.step_cache == name]:
                cache.before(rows, users)
                acting.append(cache)
        x, v, lacking = [batch.x for batch in self.batches.every], [], {}
        for number in range(len(x)):
            if x[number] is None:  # no request draws there; any tensor of the shape will do
                x[number] = self.batches.zeros()
            remembers = any(cache.remembers(number) for cache in acting)
            velocity, hidden, without = self.velocities(number, x[number], rows, remembers)
            lacking |= without
            for cache in acting:
                velocity = cache.after(number, velocity, hidden)
            v.append(velocity)
        out = self.runtime.run("step", [*rows.guidance(), *x, *v])
        for batch, latents in zip(self.batches.every, out[: len(x)], strict=True):
            batch.x = latents
        return [self._lacked(job, lacking) or self._watched(job, x, out[len(x) :]) for job in jobs]

    def _lacked(self, job: Job, lacking: Mapping[int, MemoryError]) -> MemoryError | None:
        return next((lacking[at] for at in map(self.batches.at, job.drawn_from) if at in lacking), None)

    def _watched(self, job: Job, x: list[Tensor], v: list[Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        if not job.observer.on_step:
            return None
        c, n = job.main, len(job.phase.noise)
        return tuple(self.runtime.host(tensor[c.batch], c.row)[:n] for tensor in (x, v))
