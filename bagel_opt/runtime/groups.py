"""Ranks that gather each other's tensors: on GPUs by NCCL and, what is small, by each other's memory, on CPUs by Gloo.

The communicators belong to a model. `torch.distributed.init_process_group` would make one for the process, which then could
have no second model, and no training run of its own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from bagel_opt.errors import reason
from bagel_opt.installed import fault
from bagel_opt.runtime.memory_full import memory_full

PATIENCE = 600  # seconds; a rank that lets others wait for longer hangs
LOOKING = timedelta(seconds=1)  # after which who waits for others looks whether the ranks have ended meanwhile
LOST: list[dist.Backend] = []  # with a gather that does not end, for which letting go of them would wait
# Of torch's watchdog, read as a communicator is made: a rank that dies must not end the caller's process.
WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
# Of NCCL, read when it pleases. Memory that graphs use is not registered, for which all ranks would have to capture at once.
# Multicast over NVLink is missing on many virtual machines, where NCCL fails over it, and gains nothing with so small messages.
NCCL = {"NCCL_GRAPH_REGISTER": "0", "NCCL_NVLS_ENABLE": "0"}


class Group:
    """Some of a model's ranks. rank: this one's number among them. count: gathers so far. rehearsing: a gather takes as much
    memory, and its own tensor for all others'."""

    def __init__(self, store: dist.Store, ranks: Sequence[int], me: int, device: torch.device):
        self.rank, self.size, self.count, self.rehearsing = ranks.index(me), len(ranks), 0, False
        self.device, self.inbox, self.aborted = device, None, False
        name = "ranks " + " ".join(map(str, ranks))
        store, timeout = dist.PrefixStore(name, store), timedelta(seconds=PATIENCE)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options.is_high_priority_stream = False
            options._timeout, options.group_name, options.global_ranks_in_group = timeout, name, list(ranks)
            self.backend = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self.backend = dist.ProcessGroupGloo(store, self.rank, self.size, options)
        self.options = AllgatherOptions()
        self.options.asyncOp = False  # on the current stream, where a CUDA graph captures it
        self.gather(torch.zeros(1, device=device))  # which connects them
        if device.type == "cuda" and not fault("triton"):
            from bagel_opt.runtime import inbox

            self.inbox = inbox.opened(store, self.rank, self.size, device, self._agreed)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, which has the same shape on all: [size, *x.shape]. Raises RuntimeError where a rank is gone."""
        out = x.new_empty(self.size, *x.shape)
        if self.rehearsing:
            return out.copy_(x)
        self.count += 1
        if self.inbox and self.inbox.takes(x):
            self.inbox.gather(x.contiguous(), out)
            return out
        # as bytes, in which there is no dtype that one of the libraries has not
        given = (y.contiguous().view(-1).view(torch.uint8) for y in (out, x))
        work = self.backend._allgather_base(*given, self.options)
        if work is not None:
            self._await(work)
        return out

    def _await(self, work: dist.Work) -> None:
        """Who waits for Gloo is not woken by an abort (findings/torch-gloo-abort.sh); that ranks are gone it missed once in some
        hundred kills."""
        if self.device.type == "cuda":
            work.wait()  # for the stream
            return
        while True:
            try:
                work.wait(LOOKING)
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or came just now
                    work.wait()
                    return
                if self.aborted:
                    LOST.append(self.backend)
                    raise RuntimeError("a rank is gone") from None

    def add(self, x: Tensor, parts: Tensor) -> Tensor:
        """x, which is the same on all, plus every rank's parts, added up in float32 in the order of ranks."""
        if self.inbox and self.inbox.takes(parts) and not self.rehearsing:
            self.count += 1
            out = torch.empty_like(parts)
            self.inbox.add(x.contiguous(), parts.contiguous(), out)
            return out
        return (self.gather(parts).float().sum(0) + x.float()).to(x.dtype)

    def _agreed(self, mine: bool) -> bool:
        return bool(self.gather(torch.tensor([mine], device=self.device)).all())

    @contextmanager
    def once(self, program: str) -> Iterator[None]:
        """Runs a program in which others wait for this rank: where memory is full, a second try would begin with other layers
        than theirs. Nobody waits for a rehearsal, nor while a CUDA graph is captured. Raises MemoryError."""
        try:
            yield
        except RuntimeError as error:
            place = memory_full(error)
            capturing = (
                place == "GPU" and torch.cuda.is_current_stream_capturing()
            )  # which torch without CUDA refuses to say
            if not place or self.rehearsing or capturing:
                raise
            raise MemoryError(f"the {place}'s memory is full (program {program!r}): {reason(error)}") from None

    def abort(self) -> None:
        """Ends what waits for others, and the communicator."""
        self.aborted = True
        if self.inbox:
            self.inbox.abort()
        if self.device.type == "cuda":  # Gloo ends nothing by it, and then waits at the end of the process
            self.backend.abort()

    def close(self) -> None:
        """At the end of a process: nothing is exchanged any more."""
        if self.inbox:
            self.inbox.close()


class Groups:
    """A rank's groups. world: all ranks. part[n]: n neighbours, this one among them, that share out a row's latents."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, device: torch.device, parts: Sequence[int]):
        self.rank, self.ranks = rank, ranks
        for name, value in NCCL.items():
            os.environ.setdefault(name, value)
        with watchdog_settings():
            self.world = Group(store, range(ranks), rank, device)
            self.part = {ranks: self.world}
            for size in parts:
                if 1 < size < ranks:
                    first = rank // size * size
                    self.part[size] = Group(store, range(first, first + size), rank, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @property
    def count(self) -> int:
        """Gathers so far, in all of them."""
        return sum(group.count for group in self.part.values())

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Meanwhile nothing is exchanged."""
        try:
            for group in self.part.values():
                group.rehearsing = True
            yield
        finally:
            for group in self.part.values():
                group.rehearsing = False

    def abort(self) -> None:
        for group in self.part.values():
            group.abort()

    def close(self) -> None:
        for group in self.part.values():
            group.close()


@contextmanager
def watchdog_settings() -> Iterator[None]:
    """In the environment meanwhile, where nobody set others."""
    added = WATCHDOG.keys() - os.environ.keys()
    os.environ.update({name: WATCHDOG[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
