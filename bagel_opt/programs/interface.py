"""What a runtime offers the sampling loop. Tensors are opaque to the loop; NumPy arrays go in anywhere."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from bagel_opt.profile import Profile

Tensor = Any


def in_use(need: int, size: int) -> int:
    """How much of a static size has to be computed where so much of it is needed. In steps of 64, so that sums are grouped
    alike and a shape that was compiled or captured comes back."""
    return min(size, -(-max(need, 1) // 64) * 64)


def slots_in_use(inputs: list, kv_len_B: Any, slots: int) -> int:
    """Of a cache, what a program looks at: those before it, and what it stores, with an image's markers."""
    new = inputs[0].shape[1] + 2 if inputs[0].ndim > 1 else 1
    return in_use(int(kv_len_B.max()) + new, slots)


def as_slice(rows: int | slice | None) -> slice:
    """Of the rows of a batch; None is all."""
    return slice(None) if rows is None else rows if isinstance(rows, slice) else slice(rows, rows + 1)


class Runtime(Protocol):
    """Executes the programs of programs/signatures.py. The loop may take rows of a tensor, as tensor[row] and
    tensor[first:last], and where sizes are free the first tokens of rows, as tensor[first:last, :n].

    adapters: those kept apart from the weights, with the factor that counts where a request names none; None where weights
    are fixed. Where there are some, the programs that run the transformer's layers take one more input: how much of each
    counts, float32 [rows, adapters].
    """

    adapters: Mapping[str, float] | None
    free_rows: bool  # whether "generate" takes any number of rows, and not only those that it was made for
    free_texts: bool  # whether "text" takes several rows
    free_sizes: bool  # whether programs take fewer tokens, patches and latents than the profile has, too

    def active(self) -> dict[str, str]:
        """What computes here, as runtime/active.py words it."""

    def set_adapters(self, adapters: Mapping[str, Any]) -> None:
        """Keeps these adapters apart in place of those before, where weights are not fixed. Raises as `load` does."""

    def for_profile(self, profile: Profile) -> "Runtime":
        """The runtime with the programs of one profile; weights and programs are shared. Raises ProfileError where memory was
        planned for less."""

    def close(self) -> None:
        """Ends what the runtime has started. It runs nothing afterwards."""

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        """KV caches of one batch, zero everywhere."""

    def give_back(self, caches: list[Tensor]) -> None:
        """Takes caches back, which another batch may then get."""

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> Tensor:
        """A tensor of zeros: float32, or the model's own dtype where it is to hold hidden states."""

    def write_row(self, tensor: Tensor, row: int, values: np.ndarray | Tensor) -> Tensor:
        """The tensor with the start of one row replaced, in place where that is possible."""

    def clear_row(self, caches: list[Tensor], row: int) -> None:
        """Zeros a row of a batch's caches."""

    def copy_row(self, source: list[Tensor], row: int, target: list[Tensor], to: int, length: int) -> None:
        """Copies the first `length` slots of a row from one batch's caches to a row of another's, or of the same."""

    def run(
        self,
        program: str,
        inputs: list[Tensor | np.ndarray],
        caches: list[Tensor] = (),
        rows: int | slice | None = None,
    ) -> tuple:
        """Runs a program and returns its outputs. Caches are updated in place: of all rows, or of those that the inputs
        are for."""

    def ahead(self, values: np.ndarray) -> Tensor | np.ndarray:
        """An input of a later `run`, on the device where that saves time then. Other threads than that of `run` may call it."""

    def chosen(self, ids_B: Tensor) -> tuple[Callable[[], np.ndarray], Tensor | None]:
        """The ids that "choose" gave: what waits for them, and where the device can go on with them meanwhile, what "decode" takes."""

    def host(self, tensor: Tensor, row: int | None = None) -> np.ndarray:
        """A tensor, or one row of it, as a NumPy array: floats in float32, bytes and integers as they are."""
