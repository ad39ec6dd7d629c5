"""Step caches: steps of the flow whose velocities are predicted or used again instead of evaluated.

Each has a `before`, which says what need not be evaluated in a step, and an `after`, which brings the velocities of those
rows; the arithmetic is in programs/step_cache.py. There is one object of each for an engine, over the rows of all
batches; what it remembers of a request lies in `Job.remembered`.
"""

from typing import Protocol

import numpy as np

from bagel_opt.programs.interface import Tensor
from bagel_opt.programs.signatures import MAX_ORDER, REUSE, STORE
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.flow_rows import FlowRows
from bagel_opt.sampling.job import Job


class StepCache(Protocol):
    def before(self, rows: FlowRows, jobs: list[Job]) -> None:
        """Takes out of the step what need not be evaluated of these requests, which are all that use this cache."""

    def remembers(self, batch: int) -> bool:
        """Whether `after` needs the last layer's output of that batch in this step."""

    def after(self, batch: int, velocity: Tensor, hidden: Tensor | None) -> Tensor:
        """The velocities of a batch, those of skipped rows filled in. hidden: the last layer's output, if any row was
        evaluated."""


# ---- TaylorSeer (arXiv 2503.06923, as BAGEL sets it up)

WARM_UP = 5  # full evaluations at the start
INTERVAL = 3  # afterwards every third evaluation is a full one


class BranchSeer:
    """When one guidance branch is evaluated in full and when predicted.

    Full at the branch's own evaluations 0 to 4, 7, 10, ...; differences are taken from evaluation 4 on.
    """

    def __init__(self):
        self.evaluation = -1
        self.last_full = 0
        self.factors = 0  # how many orders are stored

    def next(self) -> bool:
        """Moves on by one evaluation; True where it is a full one."""
        self.evaluation += 1
        late = self.evaluation - (WARM_UP - 1)
        return late <= 0 or late % INTERVAL == 0

    def store(self) -> tuple[int, int]:
        """Records a full evaluation: (differences to take, distance to the full evaluation before)."""
        differences = min(self.factors, MAX_ORDER) if self.evaluation >= WARM_UP - 1 else 0
        distance = self.evaluation - self.last_full
        self.last_full, self.factors = self.evaluation, differences + 1
        return differences, distance

    @property
    def distance(self) -> int:
        """Evaluations since the last full one."""
        return self.evaluation - self.last_full


class TaylorSeer:
    """Predicts the last layer's output from divided differences of earlier ones, each branch by itself."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.factors: list[Tensor | None] = [None] * len(batches.every)

    def before(self, rows: FlowRows, jobs: list[Job]) -> None:
        count = len(rows.kv_len)
        self.differences, self.distance = np.full(count, -1), np.zeros(count, np.float32)
        self.predicted = np.zeros(count, np.float32)
        for job in jobs:
            if job.remembered is None:
                job.remembered = {id(c): BranchSeer() for c in job.drawn_from}
            for c in job.branches():
                at, seer = self.batches.at(c), job.remembered[id(c)]
                if seer.next():
                    self.differences[at], self.distance[at] = seer.store()
                else:
                    self.predicted[at] = seer.distance
                    rows.skip(at)

    def remembers(self, batch: int) -> bool:
        return bool((self.batches.of(self.differences, batch) >= 0).any())

    def after(self, batch: int, velocity: Tensor, hidden: Tensor | None) -> Tensor:
        of, run = self.batches.of, self.batches.runtime.run
        if self.remembers(batch):
            if self.factors[batch] is None:
                self.factors[batch] = self.batches.hidden(MAX_ORDER + 1)
            inputs = [hidden, of(self.differences, batch), of(self.distance, batch), self.factors[batch]]
            self.factors[batch] = run("taylor_update", inputs)[0]
        if of(self.predicted, batch).any():
            velocity = run("taylor_predict", [of(self.predicted, batch), velocity, self.factors[batch]])[0]
        return velocity


# ---- TeaCache (arXiv 2411.19108)

MOST_CHANGE = 0.05  # how far the input may drift, relatively, before it is evaluated again


class Drift:
    """When a request is evaluated, and when what its last evaluation added to the input serves again.

    The relative changes of the transformer's input from step to step are added up; from MOST_CHANGE on it is evaluated.
    So are the first and the last step, and the first with more branches, as where guidance begins. All branches go
    together: they have the same input. The paper fits a polynomial of the change to each model; for BAGEL none has been
    published, so the change itself counts.
    """

    def __init__(self, steps: int):
        self.left = steps
        self.drift = 0.0
        self.branches = 0  # at the last evaluation

    def due(self, change: float, branches: int) -> bool:
        """Moves on by one step, whose input differs from the last one's by `change`; True where it is evaluated."""
        self.left -= 1
        self.drift += change
        if branches > self.branches or self.left == 0 or not self.drift < MOST_CHANGE:
            self.drift, self.branches = 0.0, branches
            return True
        return False


class TeaCache:
    """Uses what an evaluation added to its input again, while the input changes little."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.embedded: list[Tensor | None] = [None] * len(batches.every)
        self.added: list[Tensor | None] = [None] * len(batches.every)

    def before(self, rows: FlowRows, jobs: list[Job]) -> None:
        self.what = np.zeros(len(rows.kv_len), np.int64)
        changes = {batch: self._change(batch, jobs) for batch in {c.batch for job in jobs for c in job.drawn_from}}
        for job in jobs:
            if job.remembered is None:
                job.remembered = Drift(len(job.plan.steps))
            due = job.remembered.due(float(changes[job.main.batch][job.main.row]), len(job.branches()))
            for c in job.branches():
                at = self.batches.at(c)
                self.what[at] = STORE if due else REUSE
                if not due:
                    rows.skip(at)

    def _change(self, batch: int, jobs: list[Job]) -> np.ndarray:
        """How much the input of each row of a batch has changed."""
        b, p = self.batches, self.batches.profile
        t = np.zeros((p.rows, *b.config.time_shape(p.latents)), np.float32)
        n = np.zeros(p.rows, np.int64)
        index = np.zeros((p.rows, p.latents), np.int64)
        for job in jobs:
            for c in (c for c in job.drawn_from if c.batch == batch):
                t[c.row], n[c.row], index[c.row, : len(job.places)] = job.want.t, len(job.places), job.places
                if job.clean:
                    t[c.row, : job.clean] = 0
        if self.embedded[batch] is None:
            self.embedded[batch], self.added[batch] = b.hidden(), b.hidden()
        inputs = [b[batch].x, t, index, n, self.embedded[batch]]
        change, self.embedded[batch] = b.runtime.run("tea_change", inputs)
        return b.runtime.host(change)

    def remembers(self, batch: int) -> bool:
        return bool((self.batches.of(self.what, batch) == STORE).any())

    def after(self, batch: int, velocity: Tensor, hidden: Tensor | None) -> Tensor:
        what, embedded = self.batches.of(self.what, batch), self.embedded[batch]
        if not what.any():
            return velocity
        inputs = [what, embedded if hidden is None else hidden, embedded, self.added[batch], velocity]
        self.added[batch], velocity = self.batches.runtime.run("tea_apply", inputs)
        return velocity


STEP_CACHES = {"taylorseer": TaylorSeer, "teacache": TeaCache}  # by the names of request.STEP_CACHES
