"""The static batches that requests share, and the rows of them that a request has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bagel_opt.config import BagelConfig
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import Runtime, Tensor, in_use
from bagel_opt.sampling.contexts import Block


@dataclass
class Context:
    """One row: what it has read so far, and as lengths. `marks[k]` is (kv_len, position) after the first k of `blocks`."""

    batch: int
    row: int
    kv_len: int = 0
    position: int = 0
    blocks: list[Block] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    def read(self, slots: int, positions: int) -> None:
        """Counts what a program has just written."""
        self.kv_len, self.position = self.kv_len + slots, self.position + positions

    def keep(self, count: int, source: "Context | None" = None) -> None:
        """Takes the first blocks, its own or another's, for all that it has read."""
        source = source or self
        self.blocks, self.marks = source.blocks[:count], source.marks[: count + 1]
        self.kv_len, self.position = self.marks[-1]


@dataclass
class Batch:
    """The tensors of one batch, of which each is made when it is first needed.

    caches: KV caches. x: latents [rows, latents, channels]. v: velocities, and last: the last layer's output, where not
    all rows or latents are evaluated.
    """

    caches: list[Tensor] | None = None
    x: Tensor | None = None
    v: Tensor | None = None
    last: Tensor | None = None


class Batches:
    """The memory of all batches. A row is cleared when it is taken again: a request that overflowed may have left
    infinities, and 0 * inf would reach the next one."""

    def __init__(self, runtime: Runtime, config: BagelConfig, profile: Profile):
        self.runtime, self.config, self.profile = runtime, config, profile
        self.free = [(batch, row) for batch in range(profile.batches) for row in range(profile.rows)]
        self.every = [Batch() for _ in range(profile.batches)]
        self.coding = 0  # requests with a video on its way through the VAE
        self.apart: set[str] = set()  # programs for which several rows at once took too much memory

    def __getitem__(self, number: int) -> Batch:
        return self.every[number]

    def take(self) -> Context:
        return Context(*self.free.pop(0))

    def release(self, contexts: list[Context]) -> None:
        self.free = sorted(self.free + [(c.batch, c.row) for c in contexts])
        self.apart.clear()  # there may be room again

    def reserve(self, least: int, most: int) -> None:
        """Takes caches for so many rows at most, before any row is taken. Where not all have room, as many are taken as have, whose
        rows are then all that there are. Raises MemoryError where that is fewer than the least, and then holds none."""
        rows = self.profile.rows
        for batch in range(min(len(self.every), -(-most // rows))):
            try:
                self.every[batch].caches = self.runtime.caches(rows, self.profile.slots)
            except MemoryError:
                if batch * rows < least:
                    self.close()
                    raise
                self.free = [(number, row) for number, row in self.free if number < batch]
                return

    def together(self, program: str, call: Callable[[Sequence], list], given: Sequence) -> list[Any]:
        """What `call` gives for these rows or requests together. Where they lack memory for that, one by one, and so until a row
        is free; in place of what lacks it alone is the MemoryError."""
        if len(given) == 1 or program not in self.apart:
            try:
                return call(given)
            except MemoryError as error:
                if len(given) == 1:
                    return [error]
            self.apart.add(program)
        return [found for one in given for found in self.together(program, call, [one])]

    def close(self) -> None:
        """Hands the caches back; nothing may use these batches afterwards."""
        for batch in self.every:
            if batch.caches is not None:
                self.runtime.give_back(batch.caches)
                batch.caches = None

    def open(self, c: Context) -> None:
        """Makes a row ready for a new context."""
        batch = self[c.batch]
        if batch.caches is None:
            batch.caches = self.runtime.caches(self.profile.rows, self.profile.slots)
        else:
            self.runtime.clear_row(batch.caches, c.row)
        if batch.x is not None:  # programs for all rows draw in this one, too, whoever it belongs to
            self.set_latents(c, np.zeros((0, self.config.latent_dim), np.float32))

    def size(self, name: str, need: int) -> int:
        """How many text tokens, patches or latents, as the profile calls them, a program gets where so many are real."""
        most = getattr(self.profile, name)
        return in_use(need, most) if self.runtime.free_sizes else most

    def zeros(self) -> Tensor:
        """Latents or velocities of a batch [rows, latents, channels]."""
        return self.runtime.zeros((self.profile.rows, self.profile.latents, self.config.latent_dim))

    def hidden(self, *orders: int) -> Tensor:
        """Zeros like the hidden states of a batch [*orders, rows, latents, channels]."""
        sizes = self.profile.rows, self.profile.latents, self.config.llm.hidden_size
        return self.runtime.zeros((*orders, *sizes), hidden=True)

    def set_latents(self, c: Context, latents: np.ndarray) -> None:
        """Puts latent tokens [tokens, channels] into a row, zeros after them."""
        batch = self[c.batch]
        x = self.zeros() if batch.x is None else batch.x
        batch.x = self.runtime.write_row(x, c.row, padded(latents, self.profile.latents))

    def latents(self, c: Context, length: int) -> np.ndarray:
        """The first latent tokens of a row, on the host."""
        return self.runtime.host(self[c.batch].x, c.row)[:length]

    def copy_start(self, source: Context, target: Context) -> None:
        """Copies as many slots as the target counts from the source's row."""
        caches = self[source.batch].caches, self[target.batch].caches
        self.runtime.copy_row(caches[0], source.row, caches[1], target.row, target.kv_len)

    def at(self, c: Context) -> int:
        """A context's place among the rows of all batches."""
        return c.batch * self.profile.rows + c.row

    def of(self, array: np.ndarray, batch: int) -> np.ndarray:
        """One batch's part of an array over the rows of all batches."""
        return array[batch * self.profile.rows : (batch + 1) * self.profile.rows]


def padded(array: np.ndarray, length: int) -> np.ndarray:
    """The array with zeros after it, up to a static length."""
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])
