"""A model on several GPUs as one runtime: the first rank's, which the caller's process has. Each of its calls is sent to the
other ranks and performed by all; what the loop gets are names of what every rank has.

A message costs some microseconds and waits for nobody: the sampling loop knows of no rank but its own. What is wanted on the
host alone is computed here alone.
"""

import copy
import functools
import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from bagel_opt.errors import reason
from bagel_opt.files.adapters import Named, named
from bagel_opt.profile import Profile
from bagel_opt.programs.signatures import NEXT, OUTPUTS
from bagel_opt.runtime import groups
from bagel_opt.runtime.calls import Call, Handle, Kept, Name, Rank, named_in
from bagel_opt.runtime.cuda_graphs import Graphs
from bagel_opt.runtime.groups import Groups
from bagel_opt.runtime.interrupts import uninterrupted
from bagel_opt.runtime.member import FIRST
from bagel_opt.runtime.members import AGAIN, Members, failure

# Programs whose results go to the host, and what they keep to the next one of them.
ALONE = {*OUTPUTS, *(name + NEXT for name in OUTPUTS)}


class MirroredRuntime:
    """The runtime interface (programs/interface.py). Several threads may call it."""

    def __init__(self, rank: Rank, members: Members, parallel: Any):
        self.rank, self.members, self.parallel, self.profile = rank, members, parallel, None
        self.inner = rank.runtime.inner
        self.rehearses, self.rehearsed = self.inner.device.type == "cuda", {}
        self.released: deque[Name] = deque()
        self.numbers, self.lock = itertools.count(FIRST), threading.RLock()
        members.abort = functools.partial(_abort, rank.runtime.groups, self.inner.graphs)
        self.finalizer = weakref.finalize(rank, members.close)

    @property
    def adapters(self) -> Mapping[str, float] | None:
        return self.inner.adapters

    @property
    def free_rows(self) -> bool:
        return self.inner.free_rows

    @property
    def free_texts(self) -> bool:
        return self.inner.free_texts

    @property
    def free_sizes(self) -> bool:
        return self.inner.free_sizes

    def ahead(self, values: np.ndarray) -> np.ndarray:
        return values

    def active(self) -> dict[str, str]:
        found, ranks = self.inner.active(), self.rank.runtime.groups.ranks
        way = (
            self.parallel if isinstance(self.parallel, str) else ",".join(f"{k}={n}" for k, n in self.parallel.items())
        )
        return {**found, "device": f"{found['device']} x {ranks}, parallel {way}"}

    def close(self) -> None:
        """Ends the other ranks' processes."""
        self.finalizer()

    def for_profile(self, profile: Profile) -> "MirroredRuntime":
        inner = self.rank.runtime.inner.for_profile(profile)
        if inner is self.rank.runtime.inner:
            return self
        other = copy.copy(self)
        other.inner, other.profile = inner, profile
        return other

    def set_adapters(self, adapters: Named) -> None:
        here = {  # others may be in another folder
            name: (os.path.abspath(place) if os.path.exists(place) else place, factor)
            for name, (place, factor) in named(adapters).items()
        }
        _, failures = self._ask("set_adapters", here)
        if not failures:
            return
        if len(failures) == self.rank.runtime.groups.ranks:
            raise failures[0]
        self._ask("set_adapters", {})  # they are to have the same
        kind = MemoryError if isinstance(failures[0], MemoryError) else RuntimeError
        raise kind(
            f"{reason(failures[0])}; other ranks took these adapters, so none keeps any now: set them again"
        ) from failures[0]

    def caches(self, rows: int, slots: int) -> Handle:
        (caches, *_), failures = self._ask("caches", rows, slots)
        if failures:
            self._call("give_back_any", caches)
            raise failures[0]
        return caches

    def give_back(self, caches: Handle) -> None:
        with suppress(ChildProcessError):  # nothing is left to be given back
            self._call("give_back", caches)

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> Handle:
        (made, *_), failures = self._ask("zeros", tuple(shape), hidden)
        if failures:
            raise failures[0]
        return made

    def write_row(self, tensor: Handle, row: int, values: np.ndarray | Handle) -> Handle:
        self._call("write_row", tensor, row, values)
        return tensor

    def clear_row(self, caches: Handle, row: int) -> None:
        self._call("clear_row", caches, row)

    def copy_row(self, source: Handle, row: int, target: Handle, to: int, length: int) -> None:
        self._call("copy_row", source, row, target, to, length)

    def run(self, program: str, inputs: list, caches: Any = (), rows: int | slice | None = None) -> tuple:
        if program in ALONE:
            self.members.check()
            return self.inner.run(program, [self._here(x) for x in inputs])
        if self.rehearses and self.rank.runtime.exchanging(program):
            self._rehearse(program, inputs, caches, rows)
        return self._call("run", program, inputs, caches, rows)

    def _rehearse(self, program: str, inputs: list, caches: Handle, rows: int | slice | None) -> None:
        """Sees whether every rank has the memory for a program, where it is larger than those before: one that fails while
        others wait for it ends the model."""
        size = math.prod(self._here(inputs[0]).shape[:2])
        if size > self.rehearsed.get(program, 0):
            _, failures = self._ask("rehearse", program, inputs, caches, rows)
            if failures:
                raise failures[0]
            self.rehearsed[program] = size

    def chosen(self, ids_B: Handle) -> tuple[Callable[[], np.ndarray], Handle | None]:
        """All go on with this rank's."""
        mine, ids = self.inner.chosen(self._here(ids_B))
        if ids is None:
            return functools.partial(self.host, ids_B), None
        there = self._mark()
        (agreed,) = self._call("first_ranks", ids_B)
        return functools.partial(self._found, there, mine), agreed

    def host(self, tensor: Any, row: int | None = None) -> np.ndarray:
        return self._found(self._mark(), functools.partial(self.inner.host, self._here(tensor), row))

    def _found(self, there: torch.cuda.Event | None, look: Callable[[], np.ndarray]) -> np.ndarray:
        """What this rank has computed, at an event."""
        self._await_device(there)
        found = look()
        self.members.settle()
        return found

    @uninterrupted()
    def gather_seconds(self, size: int) -> float:
        """How long it takes all ranks to gather so many bytes of each, within a program."""
        with self.lock:
            return self._perform(self._new("gather_seconds", (size,), False))[0]

    # ---- calls

    def _here(self, given: Any) -> Any:
        """This rank's own of a handle."""
        if not isinstance(given, Handle):
            return given
        with self.lock:
            if self.rank.in_parts(given.ref):
                self._call("look", given)
            return self.rank.look(given.ref)

    def _mark(self) -> torch.cuda.Event | None:
        """The end of all that was launched on this rank's GPU so far."""
        if self.inner.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.inner.device))
        return event

    def _await_device(self, event: torch.cuda.Event | None) -> None:
        """Looks now and then whether it is reached, so that a rank that is gone is noticed."""
        begun = time.monotonic()
        while event and not event.query():
            self.members.check()
            seconds = time.monotonic() - begun
            if seconds > groups.PATIENCE:
                raise self.members.fail(f"the GPUs have computed for {groups.PATIENCE} s without an end: {AGAIN}")
            time.sleep(0 if seconds < 0.01 else 1e-4)  # a token is there soon, and each wait for one counts

    @uninterrupted()
    def _call(self, method: str, *given: Any, answered: bool = False) -> tuple:
        """Has all ranks perform it; handles of its results."""
        with self.lock:
            call = self._new(method, given, answered)
            count = len(self._perform(call))
        return self._handles(call, count)

    @uninterrupted()
    def _ask(self, method: str, *given: Any) -> tuple[tuple, list[Exception]]:
        """The same, and how it failed on some of the ranks."""
        failures = []
        with self.lock:
            call = self._new(method, given, True)
            try:
                self._perform(call)
            except Exception as error:
                failures.append(error)
            self.members.check()
            answers = self.members.wait_for(call.number)
        failures += [failure(rank, answer) for rank, answer in enumerate(answers, 1) if answer.error]
        return self._handles(call, 1), failures

    def _new(self, method: str, given: tuple, answered: bool) -> Call:
        released = tuple(self.released.popleft() for _ in range(len(self.released)))
        return Call(next(self.numbers), method, named_in(given), released, self.profile, answered)

    def _handles(self, call: Call, count: int) -> tuple[Handle, ...]:
        return tuple(Handle(Kept((call.number, place), self.released)) for place in range(count))

    def _perform(self, call: Call) -> tuple:
        """On all ranks; this one's results."""
        self.members.calling, exchanges = (call.number, time.monotonic()), self.rank.exchanges(call)
        self.rank.gathers = 0
        try:
            self.members.send(call)
            return self.rank.perform(call)
        except BaseException as error:
            self.members.done(call.number, self.rank.gathers)
            self._failed(call, exchanges, error)
            raise
        finally:
            self.members.done(call.number, self.rank.gathers)

    def _failed(self, call: Call, exchanges: bool, error: BaseException) -> None:
        """Of a call that failed here: the others have failed alike, or wait for this rank, and are ended. Raises that."""
        self.members.ours.add(call.number)
        if not isinstance(error, Exception):
            self.members.fail(f"rank 0 was interrupted: {AGAIN}")
        elif exchanges and error is not self.members.failed:
            alike = self.members.fail_alike(call.number)
            self.members.check()
            if not alike:
                raise self.members.fail(f"rank 0 failed where the others did not ({reason(error)}): {AGAIN}") from error


def _abort(groups: Groups, graphs: Graphs | None) -> None:
    """Ends this rank's part in what ranks exchange. NCCL stops what runs, and then waits for the graphs that it is in to go."""
    aborting = threading.Thread(target=groups.abort, daemon=True)
    aborting.start()
    if graphs:
        graphs.clear()
    aborting.join()
