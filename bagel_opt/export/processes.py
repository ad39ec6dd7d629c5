"""Work in several processes that import this package alone. Those of multiprocessing import the caller's script as well,
and run it again where it has no `if __name__ == "__main__"`.
"""

import gc
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

MOST = 8  # processes, each of which imports torch


class ProcessDiedError(RuntimeError):
    """A process that ended without a word of its own, as for want of memory."""


def in_processes(function: str, common: Any, tasks: list, most: int = MOST) -> Generator:
    """What function(common, share of the tasks) yields for each task, as it comes. function: "module:name"; everything
    must be picklable; each process has one thread. Raises what the function raised where that can be told, and
    ProcessDiedError with the end of what a process printed that died."""
    count = min(len(tasks), os.cpu_count() or 1, most)
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
            result = results.get()
            if isinstance(result, Exception):
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
        if status := process.wait():
            said = errors[0].decode(errors="replace")[-2000:].strip()
            results.put(ProcessDiedError(f"a process of the export failed with status {status}: {said}"))


def answer() -> None:
    """A process's own part: reads its work from standard input, and writes what the function yields to standard output."""
    sys.path[:], function, common, tasks = pickle.load(sys.stdin.buffer)
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no result

    def tell(result: Any) -> None:
        pickle.dump(result, out)
        out.flush()

    module, _, name = function.partition(":")
    try:
        work = getattr(importlib.import_module(module), name)
        gc.freeze()  # so that what torch holds is not looked through for garbage again and again: tracing takes a sixth less
        for result in work(common, tasks):
            tell(result)
    except (
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:  # of the files and the machine; what else fails is a fault of ours
        told = type(error)(*error.args) if type(error).__module__ == "builtins" else RuntimeError(str(error))
        told.add_note(traceback.format_exc())
        tell(told)
