"""The other ranks' processes, as the first rank has them: started, talked to, watched and ended."""

import contextlib
import os
import pickle
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from bagel_opt.runtime import groups
from bagel_opt.runtime.calls import Answer
from bagel_opt.runtime.member import Place

SETTLING = 3  # seconds in which ranks that fail alike have said so
KEPT = 1000  # calls of which the others may still tell that they failed
ENDING = 5  # seconds for a process to end by itself
AGAIN = "requests on their way are lost; load the model again"


def failure(rank: int, answer: Answer) -> Exception:
    """What a rank tells of, as an exception here."""
    kind, text = answer.error
    return (MemoryError if kind == "MemoryError" else RuntimeError)(f"rank {rank}: {text}")


class Members:
    """connections: to ranks 1, 2, ...; processes: the same, where this one started them. failed: why none is left."""

    def __init__(self, connections: list[Connection], processes: list[subprocess.Popen], folder: Any):
        self.connections, self.processes, self.folder = connections, processes, folder
        self.failed: Exception | None = None
        self.closed, self.process = False, os.getpid()
        self.abort: Callable[[], None] = lambda: None  # what ends this rank's own waiting for others
        self.changed = threading.Condition()
        self.answers: dict[tuple[int, int], Answer] = {}
        self.errors: list[tuple[int, Answer]] = []  # (rank, answer) of calls that failed and are not accounted for
        self.gathers: dict[int, int] = {}  # of this rank's own calls, where there were some
        self.ours: set[int] = set()  # calls that failed on this rank
        self.calling: tuple[int, float] | None = None  # the call in progress and since when
        self.handling = False
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def done(self, number: int, gathers: int) -> None:
        """A call has got through here, or failed, with so many tensors gathered."""
        self.calling = None
        if gathers:
            self.gathers[number] = gathers
            while len(self.gathers) > KEPT:
                del self.gathers[next(iter(self.gathers))]

    # ---- talking

    def send(self, message: Any) -> None:
        """To all. Raises what ended them."""
        self.check()
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        for connection in self.connections:
            try:
                connection.send_bytes(data)
            except OSError:
                self.watcher.join(SETTLING)  # which says how that one ended
                raise self.fail(f"a rank is gone: {AGAIN}") from None

    def check(self) -> None:
        """Raises what ended the ranks; and in a fork, which would talk to them beside the process that they belong to."""
        if self.process != os.getpid():
            raise RuntimeError(
                f"this model was loaded in process {self.process}, of which this one is a fork; load it here"
            )
        if self.failed:
            raise self.failed.with_traceback(None)
        if self.closed:
            raise RuntimeError("this model is closed; load it again")

    def wait_for(self, number: int, seconds: float | None = None) -> list[Answer]:
        """The answers of all ranks to a call. Raises what ended them, or hung."""
        seconds = groups.PATIENCE if seconds is None else seconds
        wanted, end = [(rank, number) for rank in self._ranks()], time.monotonic() + seconds
        with self.changed:
            while not all(key in self.answers for key in wanted):
                self.check()
                if not self.changed.wait(end - time.monotonic()) and time.monotonic() > end:
                    late = [rank for rank, number in wanted if (rank, number) not in self.answers]
                    raise self.fail(f"rank {late[0]} does not answer for {seconds:.0f} s: {AGAIN}")
            return [self.answers.pop(key) for key in wanted]

    def beside(self, call: Callable[[], Any]) -> Any:
        """The result of a call that waits for others, in a thread of its own: where they end, that is raised at once."""
        found: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                found.put((call(), None))
            except BaseException as error:
                found.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                result, error = found.get(timeout=0.1)
                if error:
                    raise error
                return result

    def fail_alike(self, number: int) -> bool:
        """Whether every rank failed in the call that failed here, with as many tensors gathered."""
        end = time.monotonic() + SETTLING
        with self.changed:
            while True:
                told = {rank: answer.gathers for rank, answer in self.errors if answer.number == number}
                left = end - time.monotonic()
                if len(told) == len(self.connections) or self.failed or left <= 0:
                    break
                self.changed.wait(left)
            self.errors = [(rank, answer) for rank, answer in self.errors if answer.number != number]
        mine = self.gathers.get(number, 0)
        return len(told) == len(self.connections) and all(gathers == mine for gathers in told.values())

    def settle(self) -> None:
        """Raises what failed on another rank alone, as far as they have told."""
        while not self.failed and (self.handling or any(connection.poll(0) for connection in self.connections)):
            time.sleep(0.001)
        self.check()
        with self.changed:
            errors, self.errors = self.errors, []
        for rank, answer in errors:
            if answer.number not in self.ours:
                raise failure(rank, answer)

    # ---- watching

    def _ranks(self) -> range:
        return range(1, len(self.connections) + 1)

    def _watch(self) -> None:
        while not self.closed and not self.failed:
            for connection in wait(self.connections, 1):
                self.handling = True
                rank = self.connections.index(connection) + 1
                try:
                    self._take(rank, connection.recv())
                except (EOFError, OSError):
                    if not self.closed:
                        self.fail(f"{self._ended(rank)}: {AGAIN}")
                    return
                finally:
                    self.handling = False
            calling = self.calling
            if calling and time.monotonic() - calling[1] > groups.PATIENCE:
                self.fail(f"the ranks have not got through a call for {groups.PATIENCE} s: {AGAIN}")

    def _take(self, rank: int, answer: Answer) -> None:
        """An answer; one that says that this rank will never gather what others wait for ends the model."""
        with self.changed:
            if answer.asked:
                self.answers[rank, answer.number] = answer
            else:
                self.errors.append((rank, answer))
            self.changed.notify_all()
        if not answer.asked:
            threading.Thread(target=self._judge, args=(rank, answer), daemon=True).start()

    def _judge(self, rank: int, answer: Answer) -> None:
        end = time.monotonic() + SETTLING
        while self.calling and self.calling[0] <= answer.number and time.monotonic() < end and not self.failed:
            time.sleep(0.01)
        busy = self.calling and self.calling[0] <= answer.number
        if busy or self.gathers.get(answer.number, 0) != answer.gathers:
            time.sleep(0.3)  # where it failed because another one is gone, the watcher finds that one
            self.fail(f"rank {rank} failed alone ({answer.error[1]}): {AGAIN}")

    def _ended(self, rank: int) -> str:
        """How a rank's process ended."""
        if not self.processes:
            return f"rank {rank} is gone"
        process = self.processes[rank - 1]
        try:
            status = process.wait(ENDING)
        except subprocess.TimeoutExpired:
            return f"rank {rank} (process {process.pid}) is gone"
        how = f"by signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"with status {status}"
        return f"rank {rank} (process {process.pid}) ended {how}"

    # ---- ending

    def fail(self, why: str) -> Exception:
        """Ends all ranks. -> the error of every request from now on, which is the first that there was"""
        with self.changed:
            if self.closed or self.failed:
                return self.failed or RuntimeError(why)
            self.failed = ChildProcessError(why)
            self.changed.notify_all()
        self._kill()
        threading.Thread(target=self.abort, daemon=True).start()
        return self.failed

    def close(self) -> None:
        """Ends all ranks that are still there. A fork that ends leaves them alone."""
        if self.closed or self.process != os.getpid():
            return
        self.closed = True
        for connection in self.connections:
            with contextlib.suppress(OSError, ValueError):
                connection.send(None)
        end = time.monotonic() + (0 if self.failed else ENDING)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
        self._kill()
        if threading.current_thread() is not self.watcher:
            self.watcher.join()
        for connection in self.connections:
            connection.close()
        if not self.failed:
            aborting = threading.Thread(target=self.abort, daemon=True)
            aborting.start()
            aborting.join(ENDING)
        self.folder.cleanup()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver that is stuck
                process.wait(ENDING)


def start(place: Callable[[int, str], Place], ranks: int, environment: Callable[[int], Mapping[str, str]]) -> Members:
    """Starts the ranks but the first. place: of a rank, with the folder in which they meet; environment: what is different in
    its process. They import this package alone: multiprocessing would run the caller's script again."""
    folder = tempfile.TemporaryDirectory(prefix="bagel_opt-")
    here = str(Path(__file__).parents[2])
    connections, processes = [], []
    # no pipe takes the number of a standard stream that is closed
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    try:
        for rank in range(1, ranks):
            mine, its = Pipe()
            code = f"import sys; sys.path.insert(0, {here!r}); from bagel_opt.runtime import member; member.main({its.fileno()})"
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **environment(rank)},
                    pass_fds=[its.fileno()],
                    start_new_session=True,  # ctrl-C is the first rank's, which ends the others
                )
            )
            its.close()
            connections.append(mine)
            mine.send((sys.path, place(rank, folder.name)))
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        folder.cleanup()
        raise
    return Members(connections, processes, folder)


def found_by_torchrun(place: Callable[[int, str], Place], ranks: int) -> "Members | tuple[Connection, Place]":
    """Joins processes that torchrun started: the first rank's members, or for another its connection and place."""
    from torch import distributed as dist

    store, rank, _ = next(dist.rendezvous("env://"))
    if rank:
        address, key, folder = pickle.loads(store.get("bagel_opt"))
        connection = Client(address, authkey=key)
        connection.send(rank)
        return connection, place(rank, folder)
    folder, key = tempfile.TemporaryDirectory(prefix="bagel_opt-"), secrets.token_bytes(16)
    with Listener(authkey=key) as listener:
        store.set("bagel_opt", pickle.dumps((listener.address, key, folder.name)))
        found = [listener.accept() for _ in range(1, ranks)]
    return Members([c for _, c in sorted(((c.recv(), c) for c in found), key=lambda pair: pair[0])], [], folder)
