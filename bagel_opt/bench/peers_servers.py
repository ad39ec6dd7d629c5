"""Starting servers as processes of their own for peers.py, and what they hold on the GPU."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

POLL = 0.2  # seconds


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def started(command: Sequence[str], port: int, ready: str, log: Path, patience: float) -> Iterator[tuple[str, float]]:
    """Starts a server, waits until `ready` answers 200, and ends it with all processes that it started. -> its address,
    and the seconds until it was ready. Its output goes to `log`. Raises RuntimeError with the last of that where it ends
    itself or takes longer than `patience`."""
    begun = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not _answers(port, ready):
            if process.poll() is not None:
                raise RuntimeError(f"it ended itself with status {process.returncode}: {_end(log)}; all is in {log}")
            if time.perf_counter() - begun > patience:
                raise RuntimeError(f"it was not ready after {patience:.0f} s: {_end(log)}; all is in {log}")
            time.sleep(POLL)
        yield f"http://127.0.0.1:{port}", time.perf_counter() - begun
    finally:
        _ended(process)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it said nothing"


def _ended(process: subprocess.Popen) -> None:
    """Asks the server to end, then ends what is left of its session: a peer's workers may outlive it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def gpu_memory() -> int | None:
    """Bytes in use on the first GPU, by whatever process, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return total - free


class Peak:
    """The most memory in use on the GPU while it is open, above `before`."""

    def __init__(self, before: int | None):
        self.before, self.most = before, before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        if self.before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def bytes(self) -> int | None:
        return None if self.before is None else self.most - self.before

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, gpu_memory() or 0)
            if self._done.wait(POLL):
                return
