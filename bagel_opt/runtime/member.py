"""What the ranks of a model but the first do: each loads the model and performs the calls that the first sends, until that one
closes, or is no more."""

import importlib
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bagel_opt.errors import reason
from bagel_opt.runtime.calls import Answer, Rank

LOADED, JOINED = 0, 1  # numbers of answers before the first call's
FIRST = 2  # the first call's


@dataclass(frozen=True)
class Place:
    """A rank's part in a model. folder: where ranks find each other. load: "module:function" that takes `given`. parallel: as
    `load` takes it."""

    rank: int
    ranks: int
    folder: str
    load: str
    given: Mapping[str, Any]
    parallel: Any


def main(number: int) -> None:
    """A process's own part: `number` is the file that joins it to the first rank."""
    connection, parent = Connection(number), os.getppid()
    try:
        sys.path[:], place = connection.recv()
    except EOFError:
        os._exit(1)
    logging.getLogger("bagel_opt").setLevel(logging.ERROR)  # the first rank says the same
    status = 1
    try:
        if kept := serve(connection, place, parent):  # NCCL's communicators complain when they are dropped
            kept.runtime.groups.close()
        status = 0
    except EOFError:
        pass
    finally:
        sys.stderr.flush()
        os._exit(status)  # at once: NCCL would wait for ranks that are gone


def serve(connection: Connection, place: Place, parent: int | None = None) -> Rank | None:
    """Performs calls until the first rank closes. parent: the process without which this one ends, too. -> what performed them"""
    threading.Thread(target=_watch, args=(connection.fileno(), parent), daemon=True).start()
    try:
        runtime = _load(place)
    except Exception as error:
        connection.send(Answer(LOADED, error=told(error)))
        while connection.recv() is not None:
            """Until the first rank has read it."""
        return None
    connection.send(Answer(LOADED))
    if connection.recv() is None:
        return None
    try:
        rank = join(place, runtime)
    except Exception as error:
        connection.send(Answer(JOINED, error=told(error)))
        return None
    connection.send(Answer(JOINED))
    while (call := connection.recv()) is not None:
        error = None
        try:
            rank.perform(call)
        except Exception as caught:
            error = told(caught)
        if error or call.answered:
            connection.send(Answer(call.number, call.answered, rank.gathers, error))
    return rank


def join(place: Place, runtime: Any) -> Rank:
    """Makes a loaded runtime a rank, when all others do."""
    import torch.distributed as dist

    from bagel_opt.runtime.groups import Groups
    from bagel_opt.runtime.parallel import RankRuntime, shares_for

    shares = shares_for(runtime, place.parallel, place.ranks)
    store = dist.FileStore(os.path.join(place.folder, "store"), place.ranks)
    groups = Groups(store, place.rank, place.ranks, runtime.device, shares.sequences())
    return Rank(RankRuntime(runtime, groups, shares))


def _load(place: Place) -> Any:
    module, _, name = place.load.partition(":")
    return getattr(importlib.import_module(module), name)(**place.given).runtime


def told(error: Exception) -> tuple[str, str]:
    """A failure by kind and text, for an Answer."""
    kind = MemoryError if isinstance(error, MemoryError) else type(error)  # NumPy has one of its own
    return kind.__name__, reason(error)


def _watch(number: int, parent: int | None) -> None:
    """Ends the process, whatever it does, when the first rank is gone. number: of the file that joins it to that rank."""
    poll = select.poll()
    poll.register(number, 0)  # tells of nothing but the other end's closing
    while (parent is None or os.getppid() == parent) and not poll.poll(1000):
        pass
    time.sleep(1)  # in which what came before is read, where the first rank has closed
    os._exit(1)
