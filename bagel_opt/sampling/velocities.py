"""Velocities of the rows that draw, in as few calls of "generate" as their sizes and the memory allow."""

import functools
from collections.abc import Sequence

import numpy as np

from bagel_opt.programs.interface import Tensor
from bagel_opt.programs.signatures import one_row
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.calls import Part, parts
from bagel_opt.sampling.flow_rows import FlowRows

WHOLE = "generate"


class Velocities:
    """Evaluates the rows of one batch after another."""

    def __init__(self, batches: Batches):
        self.batches, self.runtime, self.profile = batches, batches.runtime, batches.profile

    def __call__(
        self, number: int, x: Tensor, flow: FlowRows, remembers: bool
    ) -> tuple[Tensor, Tensor | None, dict[int, MemoryError]]:
        """Velocities of one batch, of all rows at once, or of those that take part where that takes less (the latents
        themselves where none does); the last layer's output where it is to be remembered; and what keeps which rows, among
        those of all batches, from being evaluated. Of the latents as many as the largest picture of a call has, where that
        can be chosen."""
        b, p, inputs = self.batches[number], self.profile, [x, *flow.evaluation(number)]
        rows = np.flatnonzero(inputs[4]).tolist()
        if not rows:
            return x, None, {}
        sizes = {row: self.batches.size("latents", int(inputs[4][row])) for row in rows}
        work = self.batches.config.llm.expert_work
        calls = parts(rows, [*sizes.values()], p.rows, self.runtime.free_rows, work)
        if calls == [(slice(0, p.rows), p.latents)] and WHOLE not in self.batches.apart:
            try:
                return *self.runtime.run(WHOLE, inputs, b.caches), {}
            except MemoryError:
                self.batches.apart.add(WHOLE)
        if b.v is None:
            b.v = self.batches.zeros()
        if remembers and b.last is None:
            b.last = self.batches.hidden()
        lacking = {}
        for part, size in calls:
            mine = [row for row in rows if part.start <= row < part.stop]
            evaluate = functools.partial(self._evaluate, number, x, flow, remembers, (part, size), sizes)
            found = self.batches.together(WHOLE, evaluate, mine)
            lacking |= {number * p.rows + row: one for row, one in zip(mine, found, strict=True) if one}
        return b.v, b.last, lacking

    def _evaluate(
        self, number: int, x: Tensor, flow: FlowRows, remembers: bool, call: Part, sizes: dict, rows: Sequence[int]
    ) -> list[None]:
        """These rows of a batch, in one call: that for several, or of a single one its own."""
        b = self.batches[number]
        part, size = call if len(rows) > 1 else (slice(rows[0], rows[0] + 1), sizes[rows[0]])
        name = WHOLE if part.stop - part.start > 1 else one_row(WHOLE, self.profile)
        x_t, *given = (array[part] for array in (x, *flow.evaluation(number, size)))
        if size < self.profile.latents:
            x_t = x_t[:, :size]
        v, hidden = self.runtime.run(name, [x_t, *given], b.caches, part)
        for place, row in enumerate(range(part.start, part.stop)):
            b.v = self.runtime.write_row(b.v, row, v[place])
            if remembers:
                b.last = self.runtime.write_row(b.last, row, hidden[place])
        return [None] * len(rows)
