"""How torch says that memory is full: of a GPU by an exception of its own, of the host in words."""

import contextlib
import errno
from collections.abc import Iterator

import torch

from bagel_opt.errors import HOST_FULL


def memory_full(error: BaseException) -> str | None:
    """Whose memory is full, the "GPU"'s or the "host"'s, where that is what an exception says. Of a CUDA graph's capture that
    failed, its context says why."""
    for one in (error, error.__context__):
        if isinstance(one, torch.OutOfMemoryError):
            return "GPU"
        if isinstance(one, RuntimeError) and any(text in str(one) for text in HOST_FULL):
            return "host"
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:  # of a file that is mapped
            return "host"
    return None


@contextlib.contextmanager
def room_for_weights(host: str, gpu: str) -> Iterator[None]:
    """What is done meanwhile needs memory for weights. host, gpu: what to do where that is full. Raises MemoryError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        place = memory_full(error)
        if not place:
            raise
        raise MemoryError(
            f"the {place} has no memory left for the weights; {gpu if place == 'GPU' else host}"
        ) from None
