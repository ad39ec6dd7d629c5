"""One sampling loop for every runtime: requests as coroutines over common static rows.

A request runs by itself until it needs a token or a velocity; the engine then serves all requests that wait for the
same in one call per batch. Between programs a request is nothing but lengths: which rows it has, how many slots of
them are valid, which position comes next.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.profile import Profile
from bagel_opt.request import RENORM_TYPES
from bagel_opt.runtime.base import Runtime, Tensor
from bagel_opt.runtime.programs import ROW
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.flow import MAX_ORDER, REUSE, STORE, FlowStep
from bagel_opt.sampling.job import Job, Token
from bagel_opt.sampling.plan import Plan, slots_together
from bagel_opt.tokenizer import Tokenizer

# What a call of a program costs besides computing: as operations that two cores of a CPU could have done meanwhile, and
# for reading the weights as tokens, of which a CPU computes 20 in that time and a GPU some hundreds.
CALL, READ = 1.5e9, 100
PATIENCE = 8  # how many may pass a request that waits for more rows than are free


class Engine:
    """Serves requests that come and go between its steps, in rows that they share."""

    def __init__(self, runtime: Runtime, config: BagelConfig, tokenizer: Tokenizer, profile: Profile):
        self.runtime, self.config, self.tokenizer, self.profile = runtime, config, tokenizer, profile
        self.batches = Batches(runtime, config, profile)
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.finished: list[Job] = []
        self.flow_seconds = 0.0  # what the last flow step took

    def run(self, plans: list[Plan]) -> list[list | Exception]:
        """The outputs of each request, in order; the exception in place of a request that failed by itself. The engine
        is used up."""
        jobs = [self.submit(plan) for plan in plans]
        try:
            while self.waiting or self.active:
                self.step()
        finally:
            self.batches.close()
        return [job.result for job in jobs]

    def submit(self, plan: Plan) -> Job:
        """Puts a request in line; it joins in the first step with room for it."""
        job = Job(plan, self.batches, self.tokenizer)
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
        """One round: one program for each request that still reads, tokens for all that write, and one flow step for
        all that draw. While some write and some draw, each side gets half of the time. -> the requests that ended"""
        self._admit()
        for job in [job for job in self.active if job.want is None]:
            self._advance(job)
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

    def _admits(self, plan: Plan) -> bool:
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

    def _decode(self, jobs: list[Job]) -> list[int]:
        """The next token of each of these requests."""
        kv_len, position = self._lengths()
        ids = np.zeros_like(kv_len)
        temperature, uniform = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
        for job in jobs:
            at, want = self.batches.at(job.main), job.want
            ids[at], temperature[at], uniform[at] = want.id, want.temperature, want.uniform
        for batch in {job.main.batch for job in jobs}:
            rows, ending, row = slice(None), "", None
            mine = [job.main.row for job in jobs if job.main.batch == batch]
            if len(mine) == 1 < self.profile.rows:
                rows, ending, row = slice(mine[0], mine[0] + 1), ROW, mine[0]
            inputs = [self.batches.of(array, batch)[rows] for array in (ids, position, kv_len)]
            logits = self.runtime.run("decode" + ending, inputs, self.batches.caches[batch], row)[0]
            choice = [self.batches.of(array, batch)[rows] for array in (temperature, uniform)]
            chosen = self.runtime.run("choose" + ending, [logits, *choice])[0]
            self.batches.of(ids, batch)[rows] = self.runtime.host(chosen)
        return [int(ids[self.batches.at(job.main)]) for job in jobs]

    def _denoise(self, jobs: list[Job]) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """One flow step of each of these requests; (x_t, v_t) for those that watch."""
        kv_len, position = self._lengths()
        rows, p = len(kv_len), self.profile
        cond, text, img = (np.arange(rows) for _ in range(3))
        text_scale, img_scale, renorm_min, dt, t = (np.zeros(rows, np.float32) for _ in range(5))
        renorm, n, n_evaluated = (np.zeros(rows, np.int64) for _ in range(3))
        index = np.zeros((rows, p.latents), np.int64)
        differences, distance = np.full(rows, -1), np.zeros(rows, np.float32)
        predicted, tea = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
        skipping = self._skipping([job for job in jobs if job.tea])
        for job in jobs:
            options, step, grid = job.plan.options, job.want, job.plan.grid
            places = images.positions(*grid, self.config.latent_side)
            for c in job.contexts:
                at = self.batches.at(c)
                cond[at], text[at], img[at] = (self.batches.at(b) for b in (job.main, job.cfg_text, job.cfg_img))
                text_scale[at] = options.cfg_text_scale if step.guided else 0
                img_scale[at] = options.cfg_img_scale if step.guided else 0
                renorm_min[at], renorm[at] = options.cfg_renorm_min, RENORM_TYPES.index(options.cfg_renorm_type)
                dt[at], n[at] = step.dt, len(places)
            for c in job.branches():
                at = self.batches.at(c)
                if job.tea:
                    tea[at] = REUSE if job in skipping else STORE
                if tea[at] != REUSE and (c.seer is None or c.seer.next()):
                    t[at], n_evaluated[at], index[at, : len(places)] = step.t, len(places), places
                    if c.seer:
                        differences[at], distance[at] = c.seer.store()
                elif c.seer:
                    predicted[at] = c.seer.distance
        x, v = list(self.batches.x), list(self.batches.x)
        for batch in range(p.batches):
            if x[batch] is None:  # no request draws there; any tensor of the shape will do
                x[batch] = v[batch] = self.batches.zeros()
            mine = [self.batches.of(array, batch) for array in (t, index, position, n_evaluated, kv_len)]
            taken, what, hidden = self.batches.of(differences, batch), self.batches.of(tea, batch), None
            if mine[3].any():
                remembers = (taken >= 0).any() or (what == STORE).any()
                v[batch], hidden = self._evaluate(batch, [x[batch], *mine], remembers)
            if (taken >= 0).any():
                self._remember(batch, hidden, taken, self.batches.of(distance, batch))
            if what.any():
                embedded = self.batches.embedded[batch]
                inputs = [what, embedded if hidden is None else hidden, embedded, self.batches.added[batch], v[batch]]
                self.batches.added[batch], v[batch] = self.runtime.run("tea_apply", inputs)
            if self.batches.of(predicted, batch).any():
                inputs = [self.batches.of(predicted, batch), v[batch], self.batches.factors[batch]]
                v[batch] = self.runtime.run("taylor_predict", inputs)[0]
        numbers = [cond, text, img, text_scale, img_scale, renorm_min, renorm, dt, n]
        out = self.runtime.run("step", [*numbers, *x, *v])
        self.batches.x, v = list(out[: p.batches]), out[p.batches :]
        return [self._watched(job, x, v) for job in jobs]

    def _skipping(self, jobs: list[Job]) -> list[Job]:
        """Those of these requests, all with TeaCache, that are not evaluated in this step."""
        p, b, changes = self.profile, self.batches, {}
        for batch in {c.batch for job in jobs for c in job.contexts}:
            t, n, index = (
                np.zeros(p.rows, np.float32),
                np.zeros(p.rows, np.int64),
                np.zeros((p.rows, p.latents), np.int64),
            )
            for job in jobs:
                places = images.positions(*job.plan.grid, self.config.latent_side)
                for c in (c for c in job.contexts if c.batch == batch):
                    t[c.row], n[c.row], index[c.row, : len(places)] = job.want.t, len(places), places
            if b.embedded[batch] is None:
                b.embedded[batch], b.added[batch] = b.hidden(), b.hidden()
            change, b.embedded[batch] = self.runtime.run("tea_change", [b.x[batch], t, index, n, b.embedded[batch]])
            changes[batch] = self.runtime.host(change)
        drift = [float(changes[job.main.batch][job.main.row]) for job in jobs]
        return [job for job, d in zip(jobs, drift, strict=True) if not job.tea.due(d, len(job.branches()))]

    def _evaluate(self, batch: int, inputs: list, remembers: bool) -> tuple[Tensor, Tensor | None]:
        """Velocities of one batch, of all rows at once, or of those that take part where that takes less; and the last
        layer's output where it is to be remembered."""
        b, caches, rows = self.batches, self.batches.caches[batch], np.flatnonzero(inputs[4]).tolist()
        parts = _runs(rows) if self.runtime.free_rows else [slice(row, row + 1) for row in rows]
        token, every = self.config.llm.expert_work, self.profile.rows
        row, call = token * (self.profile.latents + 2), CALL + READ * token
        together = not self.runtime.free_rows and every * row + call < len(rows) * (row + call)
        if together or len(rows) == every:
            return self.runtime.run("generate", inputs, caches)
        if b.v[batch] is None:
            b.v[batch] = b.zeros()
        if remembers and b.last[batch] is None:
            b.last[batch] = b.hidden()
        for part in parts:
            name = "generate" if part.stop - part.start > 1 else "generate" + ROW
            v, hidden = self.runtime.run(name, [x[part] for x in inputs], caches, part)
            for number, row in enumerate(range(part.start, part.stop)):
                b.v[batch] = self.runtime.write_row(b.v[batch], row, v[number])
                if remembers:
                    b.last[batch] = self.runtime.write_row(b.last[batch], row, hidden[number])
        return b.v[batch], b.last[batch]

    def _remember(self, batch: int, hidden: Tensor, differences: np.ndarray, distance: np.ndarray) -> None:
        """Stores the last layer's output for TaylorSeer."""
        if self.batches.factors[batch] is None:
            self.batches.factors[batch] = self.batches.hidden(MAX_ORDER + 1)
        inputs = [hidden, differences, distance, self.batches.factors[batch]]
        self.batches.factors[batch] = self.runtime.run("taylor_update", inputs)[0]

    def _watched(self, job: Job, x: list[Tensor], v: list[Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        if not job.plan.options.on_step:
            return None
        c, n = job.main, len(job.plan.noise)
        return tuple(self.runtime.host(tensor[c.batch], c.row)[:n] for tensor in (x, v))


def _runs(rows: list[int]) -> list[slice]:
    """Ascending rows as slices of neighbours."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row + 1 for row in rows if row + 1 not in rows]
    return [slice(*bounds) for bounds in zip(starts, ends, strict=True)]
