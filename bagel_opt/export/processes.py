"""Work in several processes that import this package alone. Those of multiprocessing import the caller's script as well,
and run it again where it has no `if __name__ == "__main__"`.
"""

import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

MOST = 8  # processes, each of which imports torch


def in_processes(function: str, common: Any, tasks: list) -> Generator:
    """What function(common, share of the tasks) yields in each process, as it comes. function: "module:name"; everything
    must be picklable. Raises RuntimeError with the end of what a process printed that failed."""
    count = min(len(tasks), os.cpu_count() or 1, MOST)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parents[2])
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {here!r}); import {__name__} as work; work.answer()",
    ]
    running: list[subprocess.Popen] = []
    results: queue.SimpleQueue = queue.SimpleQueue()
    try:
        for number in range(count):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
            running.append(process)
            process.stdin.write(pickle.dumps((sys.path, function, common, tasks[number::count])))
            process.stdin.close()
            threading.Thread(target=_listen, args=(process, results), daemon=True).start()
        for _ in tasks:
            if isinstance(result := results.get(), RuntimeError):
                raise result
            yield result
    finally:
        for process in running:
            process.kill()
            process.wait()


def _listen(process: subprocess.Popen, results: queue.SimpleQueue) -> None:
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True)
    reader.start()
    try:
        while True:
            results.put(pickle.load(process.stdout))
    except (EOFError, pickle.UnpicklingError):
        reader.join()
        if process.wait():
            results.put(RuntimeError(f"a process of the export failed: {errors[0].decode()[-2000:].strip()}"))


def answer() -> None:
    """A process's own part: reads its work from standard input, and writes what the function yields to standard output."""
    sys.path[:], function, common, tasks = pickle.load(sys.stdin.buffer)
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no result
    module, _, name = function.partition(":")
    for result in getattr(importlib.import_module(module), name)(common, tasks):
        pickle.dump(result, out)
        out.flush()
