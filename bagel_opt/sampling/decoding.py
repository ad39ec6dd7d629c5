"""The next tokens of all requests that write.

Where the runtime allows it, a device goes on with the token that it has chosen while the host still looks at that token. What it
computes so is thrown away where the host wants another one, as after the end of a text: it was written past what the row holds.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bagel_opt.programs.interface import Tensor
from bagel_opt.programs.signatures import ROW
from bagel_opt.sampling import nucleus
from bagel_opt.sampling.adapters import as_inputs
from bagel_opt.sampling.batches import Batches
from bagel_opt.sampling.job import Job, Token


@dataclass(frozen=True)
class Asked:
    """What is asked for the rows of a batch, or for one of them: arrays of a number a row, share of adapters a row. texts:
    of each row, which text goes on there; None where none does. ids: on the device, where the host does not know them yet."""

    texts: tuple[object, ...]
    ids: np.ndarray | Tensor
    position: np.ndarray
    kv_len: np.ndarray
    temperature: np.ndarray
    uniform: np.ndarray
    share: np.ndarray

    def part(self, rows: slice) -> "Asked":
        return Asked(*(value[rows] for value in vars(self).values()))


@dataclass(frozen=True)
class Launched:
    """A decoding on its way, of the rows in which these texts go on."""

    texts: tuple[object, ...]
    logits: Tensor
    chosen: Tensor

    def serves(self, texts: tuple[object, ...]) -> bool:
        """Whether these go on there. Each text takes part in each decoding, so what it then asks for is what was launched."""
        return all(mine is text for mine, text in zip(self.texts, texts, strict=True) if text is not None)


class Decoder:
    """Decodes for the rows of all batches."""

    def __init__(self, batches: Batches):
        self.batches, self.runtime, self.profile = batches, batches.runtime, batches.profile
        self.ahead: dict[tuple[int, int | None], Launched] = {}  # by the batch, and the row where it is for one alone

    def __call__(self, jobs: Sequence[Job], kv_len: np.ndarray, position: np.ndarray) -> list[int | MemoryError]:
        """The next token of each of these requests. kv_len, position: of the rows of all batches."""
        ahead, self.ahead = self.ahead, {}
        asked, found = self._asked(jobs, kv_len, position), {}
        for batch in sorted({job.main.batch for job in jobs}):
            mine = [job for job in jobs if job.main.batch == batch]
            of_batch = Asked(*(self.batches.of(value, batch) for value in vars(asked).values()))
            tokens = self.batches.together("decode", functools.partial(self._next, batch, of_batch, ahead), mine)
            found |= zip(map(id, mine), tokens, strict=True)
        return [found[id(job)] for job in jobs]

    def _next(
        self, batch: int, asked: Asked, ahead: Mapping[tuple[int, int | None], Launched], jobs: Sequence[Job]
    ) -> list[int]:
        """Of requests in one batch."""
        row = jobs[0].main.row if len(jobs) == 1 < self.profile.rows else None
        wanted = asked.part(slice(None) if row is None else slice(row, row + 1))
        launched = ahead.get((batch, row))
        if not launched or not launched.serves(wanted.texts):
            launched = self._launch(batch, row, wanted)
        wait, ids = self.runtime.chosen(launched.chosen)
        if ids is not None and all(job.want.following is not None for job in jobs):
            self._go_on(batch, row, wanted, jobs, ids)
        chosen, first = wait(), row or 0
        return [
            self._in_nucleus(launched.logits, job.main.row - first, job.want, int(chosen[job.main.row - first]))
            for job in jobs
        ]

    def _asked(self, jobs: Sequence[Job], kv_len: np.ndarray, position: np.ndarray) -> Asked:
        ids, texts = np.zeros_like(kv_len), [None] * len(kv_len)
        temperature, uniform = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
        share = np.zeros((len(ids), len(jobs[0].share)), np.float32)
        for job in jobs:
            at, want = self.batches.at(job.main), job.want
            texts[at], ids[at], temperature[at], uniform[at] = want.text, want.id, want.temperature, want.uniform
            share[at] = job.share
        return Asked(tuple(texts), ids, position, kv_len, temperature, uniform, share)

    def _launch(self, batch: int, row: int | None, asked: Asked) -> Launched:
        ending = "" if row is None else ROW
        inputs = [asked.ids, asked.position, asked.kv_len, *as_inputs(asked.share)]
        logits = self.runtime.run("decode" + ending, inputs, self.batches[batch].caches, row)[0]
        chosen = self.runtime.run("choose" + ending, [logits, asked.temperature, asked.uniform])[0]
        return Launched(asked.texts, logits, chosen)

    def _go_on(self, batch: int, row: int | None, asked: Asked, jobs: Sequence[Job], ids: Tensor) -> None:
        """Launches what the requests will ask for next, unless their texts end."""
        writing = np.array([text is not None for text in asked.texts], np.int64)
        uniform = asked.uniform.copy()
        for job in jobs:
            uniform[job.main.row - (row or 0)] = job.want.following
        later = replace(
            asked, ids=ids, position=asked.position + writing, kv_len=asked.kv_len + writing, uniform=uniform
        )
        with contextlib.suppress(MemoryError):  # then they have to ask
            self.ahead[batch, row] = self._launch(batch, row, later)

    def _in_nucleus(self, logits: Tensor, row: int, want: Token, token: int) -> int:
        """Chooses again where a request samples from a part of the vocabulary."""
        if want.top_p < 1 and want.temperature and token >= 0:
            return nucleus.sample(self.runtime.host(logits, row), want.temperature, want.top_p, want.uniform)
        return token
