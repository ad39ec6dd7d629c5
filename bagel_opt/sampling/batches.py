"""The static batches that requests share, and the rows of them that a request has."""

from dataclasses import dataclass, field

import numpy as np

from bagel_opt.config import BagelConfig
from bagel_opt.profile import Profile
from bagel_opt.runtime.base import Runtime, Tensor
from bagel_opt.sampling.flow import TaylorSeer


@dataclass
class Context:
    """One row: what it has read so far, as lengths. `marks[k]` is (kv_len, position) after the first k blocks."""

    batch: int
    row: int
    kv_len: int = 0
    position: int = 0
    marks: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    seer: TaylorSeer | None = None


class Batches:
    """The memory of all batches. Each is allocated when its first row is taken, and a row is cleared when it is
    taken again: a request that overflowed may have left infinities, and 0 * inf would reach the next one."""

    def __init__(self, runtime: Runtime, config: BagelConfig, profile: Profile):
        self.runtime, self.config, self.profile = runtime, config, profile
        self.free = [(batch, row) for batch in range(profile.batches) for row in range(profile.rows)]
        self.caches: list[list[Tensor] | None] = [None] * profile.batches
        self.x: list[Tensor | None] = [None] * profile.batches  # latents [rows, latents, channels]
        self.v: list[Tensor | None] = [None] * profile.batches  # velocities, where rows are evaluated one by one
        self.last: list[Tensor | None] = [None] * profile.batches  # and the last layer's output, where it is remembered
        self.factors: list[Tensor | None] = [None] * profile.batches  # TaylorSeer's, where a request uses it
        self.embedded: list[Tensor | None] = [None] * profile.batches  # and TeaCache's
        self.added: list[Tensor | None] = [None] * profile.batches

    def take(self, taylorseer: bool) -> Context:
        return Context(*self.free.pop(0), seer=TaylorSeer() if taylorseer else None)

    def release(self, contexts: list[Context]) -> None:
        self.free = sorted(self.free + [(c.batch, c.row) for c in contexts])

    def close(self) -> None:
        """Hands the caches back; nothing may use these batches afterwards."""
        for caches in filter(None, self.caches):
            self.runtime.give_back(caches)

    def open(self, c: Context) -> None:
        """Makes a row ready for a new context."""
        if self.caches[c.batch] is None:
            self.caches[c.batch] = self.runtime.caches(self.profile.rows, self.profile.slots)
        else:
            self.runtime.clear_row(self.caches[c.batch], c.row)

    def zeros(self) -> Tensor:
        """Latents or velocities of a batch [rows, latents, channels]."""
        return self.runtime.zeros((self.profile.rows, self.profile.latents, self.config.latent_dim))

    def hidden(self, *orders: int) -> Tensor:
        """Zeros like the hidden states of a batch [*orders, rows, latents, channels]."""
        sizes = self.profile.rows, self.profile.latents, self.config.llm.hidden_size
        return self.runtime.zeros((*orders, *sizes), hidden=True)

    def set_latents(self, c: Context, latents: np.ndarray) -> None:
        """Puts latent tokens [tokens, channels] into a row, zeros after them."""
        if self.x[c.batch] is None:
            self.x[c.batch] = self.zeros()
        self.x[c.batch] = self.runtime.write_row(self.x[c.batch], c.row, padded(latents, self.profile.latents))

    def latents(self, c: Context, length: int) -> np.ndarray:
        """The first latent tokens of a row, on the host."""
        return self.runtime.host(self.x[c.batch], c.row)[:length]

    def copy_start(self, source: Context, target: Context) -> None:
        """Copies as many slots as the target counts from the source's row."""
        caches = self.caches[source.batch], self.caches[target.batch]
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
