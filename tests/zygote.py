"""A process that has imported the libraries that take seconds, and forks into each Python process that it is asked for. Of
bagel_opt it has imported nothing, so each process imports that itself. The first of each kind is a new one all the same.

A request is a line of JSON at a socket, with the files that the process is to have; the answers are its number and, when
it has ended, its status. It is killed where the one that asked is gone.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LIBRARIES = ("PIL.Image", "numpy", "onnx", "onnxscript", "rich", "safetensors.torch", "tokenizers")
LIBRARIES += ("torch", "torch.distributed", "torch.export", "torch.onnx")
SHIM = """#!{python} -IS
import json, os, socket, sys

link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
about = {{"arguments": [*{given!r}, *sys.argv[1:]], "env": dict(os.environ), "cwd": os.getcwd(), "numbers": [0, 1, 2]}}
socket.send_fds(link, [json.dumps(about).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(link.makefile().read().split()[1]))
"""


class Process:
    """As subprocess.Popen has it. numbers: which the files have in that process."""

    def __init__(self, address: str, arguments: Sequence[str], files: Mapping[int, int], **about):
        self.link, self.lock, self.returncode = socket.socket(socket.AF_UNIX), threading.Lock(), None
        self.link.connect(address)
        about |= {"arguments": arguments, "numbers": list(files)}
        socket.send_fds(self.link, [json.dumps(about).encode() + b"\n"], list(files.values()))
        self.answers = self.link.makefile()
        self.pid = int(self.answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self.link], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a process", timeout)
        with self.lock:
            if self.returncode is None:
                self.returncode = int(self.answers.readline())
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with self.lock, contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """How to have processes of it."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder / "socket")

    def popen(
        self, command, stdin=None, stdout=None, stderr=None, env=None, pass_fds=(), start_new_session=False
    ) -> Process:
        """What subprocess.Popen takes and gives, where the command is sys.executable's and the streams are DEVNULL, a file, or None,
        and errors perhaps STDOUT."""
        assert command[0] == sys.executable
        with open(os.devnull, "r+b") as null:
            files = {number: number for number in (0, 1, 2, *pass_fds)}
            for number, given in enumerate((stdin, stdout)):
                if given is not None:
                    files[number] = (null if given is subprocess.DEVNULL else given).fileno()
            if stderr is subprocess.STDOUT:
                files[2] = files[1]
            about = {"env": dict(os.environ if env is None else env), "cwd": os.getcwd(), "session": start_new_session}
            return Process(self.address, command[1:], files, **about)

    def shims(self) -> Path:
        """A folder of programs that stand for Python and for those installed beside it, to be found before them."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        installed = Path(sys.executable).with_name("bagel-opt")
        for name, given in (("python", []), ("bagel-opt", [str(installed)])):
            shim = folder / name
            shim.write_text(SHIM.format(python=sys.executable, address=self.address, given=given))
            shim.chmod(0o755)
        return folder


@contextlib.contextmanager
def zygote() -> Iterator[Zygote]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        found = Zygote(Path(folder))
        listener.bind(found.address)
        listener.listen()
        command = [sys.executable, "-I", __file__, str(listener.fileno())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])
        try:
            yield found
        finally:
            process.terminate()
            process.wait()


# ---- its own part


def main(listener: socket.socket) -> None:
    """Answers until it is ended. In a process that it forks, returns when that has become what was asked for."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    links: dict[int, socket.socket] = {}  # of processes
    kinds: set[tuple[str, ...]] = set()
    while True:
        ready = select.select([listener, woken, *links.values()], [], [])[0]
        if listener in ready:
            link = listener.accept()[0]
            about, files = received(link)
            kind = tuple(about["arguments"][: 2 if about["arguments"][0] == "-m" else 1])
            child = os.fork()
            if not child:
                for one in (listener, woken, waker, link, *links.values()):
                    one.close()
                return become(about, files, forked=kind in kinds)
            kinds.add(kind)
            links[child] = link
            for number in files:
                os.close(number)
            link.sendall(f"{child}\n".encode())
        if woken in ready:
            woken.recv(4096)
        for pid, link in [*links.items()]:
            if link in ready:  # the one that asked is gone
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                links.pop(pid).close()


def received(link: socket.socket) -> tuple[dict, list[int]]:
    """A request, and its files."""
    data, files = b"", []
    while not data.endswith(b"\n"):
        more, some, _, _ = socket.recv_fds(link, 1 << 16, 16)
        data, files = data + more, files + some
    return json.loads(data), files


def become(about: dict, files: list[int], forked: bool) -> None:
    """What Python is when it has been started so."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if about.get("session"):
        os.setsid()
    high = max(about["numbers"]) + 100
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, high) for number in files]
    os.closerange(3, high)
    for number, file in zip(about["numbers"], moved, strict=True):
        os.dup2(file, number)
    os.closerange(high, high + 1000)
    os.chdir(about["cwd"])
    os.environ.clear()
    os.environ.update(about["env"])
    arguments = about["arguments"]
    if not forked:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        stream = open(number, mode, 1 if number == 2 else -1, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    own, *rest = arguments
    first = {"-c": "", "-m": about["cwd"]}.get(own, str(Path(own).parent))
    sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if own == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif own == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(own, run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
