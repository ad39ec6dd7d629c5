"""What every command shows: progress bars, tables, and an error in one line."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from bagel_opt.errors import HOST_FULL, shown

OUT_OF_MEMORY = "out of memory", *HOST_FULL  # as torch says it of a GPU and of the host
# As torch's compiler and Triton say it.
NO_COMPILER = ("No working C++ compiler", "C++ compile error", "Failed to find C compiler")


class PlainConsole(Console):
    """What is printed has text out of files in it: no markup of rich's, and nothing that steers a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False, "highlight": False})


console = PlainConsole(stderr=True, soft_wrap=True)


def guarded(run: Callable[[], object]) -> int:
    """Runs a command; an error of the user's or of a file becomes one line on stderr. -> the exit status"""
    try:
        run()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        return _fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        lines = str(error).splitlines()
        if failed := next((line for line in lines if any(text in line for text in NO_COMPILER)), None):
            return _fail(
                f"{failed.strip()}; compiling needs a C++ compiler, such as g++, or one named by CXX, and for a GPU gcc and the "
                "CUDA toolkit; --backend eager and bundles of --format onnx or export need none"
            )
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        said = " ".join(str(error).split("\n")[0].split())
        if isinstance(error, MemoryError) and "; " in said:  # one of ours that says what to do, after a semicolon
            return _fail(f"out of memory: {said}")
        return _fail(
            f"out of memory{said and f' ({said})'}; use a smaller picture, a shorter text or a smaller profile, and for a "
            "checkpoint another --dtype or --device cpu"
        )
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"bagel-opt: {shown(message)}", file=sys.stderr)
    return status


def say(text: str) -> None:
    """Prints what a model wrote; to a file or a pipe as it is."""
    print(shown(text) if sys.stdout.isatty() else text)


class _Notes(logging.Handler):
    """Lines of the package's log, such as which of several files was taken."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage())


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Shows them meanwhile."""
    log, handler = logging.getLogger("bagel_opt"), _Notes(logging.INFO)
    handler.addFilter(lambda record: record.name == log.name)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def tables() -> Console:
    """Where tables go. A pipe or a file has no width to break them at."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PlainConsole(width=None if fixed else 250)


class Bar:
    """A progress bar on stderr where that is a terminal."""

    def __init__(self, progress: Progress, what: str):
        self.progress, self.task = progress, progress.add_task(what, total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.task, description=what, completed=done, total=total)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Takes it away while something else is printed."""
        self.progress.live.stop()
        try:
            yield
        finally:
            self.progress.start()


@contextlib.contextmanager
def bar(what: str) -> Iterator[Bar]:
    """A bar, which is gone afterwards."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        yield Bar(progress, what)
