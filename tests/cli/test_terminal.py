"""Pictures in the terminal, in terminals that are played here, and the command that makes a picture again."""

import base64
import fcntl
import io
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import edit_weights
from PIL import Image
from rich.table import Table
from support import CHECKPOINT, GOLDEN, exit_with, speak_to

import bagel_opt
from bagel_opt import BundleError, CheckpointError, Options, ProfileError
from bagel_opt.cli import terminal
from bagel_opt.cli.commands import main
from bagel_opt.cli.console import PlainConsole, guarded, tables

ROOT = Path(bagel_opt.__file__).parent.parent
INPUT = GOLDEN / "cases" / "image_editing" / "input0.png"
SMALL = ["--checkpoint", str(CHECKPOINT), "--num-timesteps", "3"]
SIZE = ["--height", "64", "--width", "128"]
DEVICE, CELL, KITTY = b"\x1b[c", b"\x1b[16t", re.compile(rb"\x1b_Gi=(\d+),s=1,v=1,a=q[^\x1b]*\x1b\\")
CELL_SIZE = b"\x1b[6;20;10t"  # 20 pixels high, 10 wide


def sixel(query):
    return {DEVICE: b"\x1b[?62;4;22c", CELL: CELL_SIZE}.get(query)


def kitty(query):
    if match := KITTY.fullmatch(query):
        return b"\x1b_Gi=" + match[1] + b";OK\x1b\\"
    return {DEVICE: b"\x1b[?62c", CELL: CELL_SIZE}.get(query)


def plain(query):
    return {DEVICE: b"\x1b[?1;2c"}.get(query)


def in_terminal(tmp_path, answers, *argv, **environment):
    """Runs a command in a terminal of 40 x 100 cells: (what it wrote there, what it was asked, standard error)."""
    for name in [name for name in sys.modules if name.startswith("textual_image")]:
        del sys.modules[name]  # it asks as it is imported
    with (tmp_path / "stderr").open("wb") as errors:
        process, master = pty.fork()
        if not process:
            speak_to(1, errors.fileno())
            sys.stdin = os.fdopen(0)
            os.environ.update({"TERM": "xterm-256color", **environment})
            os.chdir(tmp_path)
            exit_with(main, list(map(str, argv)))
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown, asked, rest, end = b"", [], b"", time.monotonic() + 120
    while time.monotonic() < end and select.select([master], [], [], 120)[0]:
        try:
            data = os.read(master, 65536)
        except OSError:  # it has ended
            break
        if not data:
            break
        shown, rest = shown + data, rest + data
        while queries := re.search(rb"\x1b\[c|\x1b\[16t|" + KITTY.pattern, rest):
            asked.append(queries[0])
            rest = rest[queries.end() :]
            if answer := answers(queries[0]):
                os.write(master, answer)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, (tmp_path / "stderr").read_text()
    return shown, asked, (tmp_path / "stderr").read_text()


# ---- pictures


@pytest.mark.parametrize("command", [["generate", "a cat", *SIZE], ["edit", INPUT, "make it red"]])
def test_sixel(tmp_path, command):
    shown, asked, _ = in_terminal(tmp_path, sixel, *command, *SMALL)
    assert asked[0] == DEVICE
    height, width = Image.open(tmp_path / "out.png").size[::-1]
    [found] = re.findall(rb'\x1bP[0-9;]*q"1;1;(\d+);(\d+)[^\x1b]*\x1b\\', shown)
    columns, rows = int(found[0]) // 10, int(found[1]) // 20
    assert rows <= 24
    assert columns <= 100
    assert abs(columns * 10 * height / width - rows * 20) <= 20  # undistorted but for whole cells
    assert shown.endswith(b"\x1b8out.png\r\n")  # \x1b8: back to the line below the picture


def test_kitty(tmp_path):
    shown, _, _ = in_terminal(tmp_path, kitty, "generate", "a cat", *SIZE, *SMALL)
    chunks = re.findall(rb"\x1b_Gi=\d+,m=[01],f=100,q=2;([^\x1b]*)\x1b\\", shown)
    sent = Image.open(io.BytesIO(base64.b64decode(b"".join(chunks))))
    saved = Image.open(tmp_path / "out.png")
    assert np.abs(np.asarray(sent.convert("RGB").resize((16, 8)), int) - np.asarray(saved.resize((16, 8)))).mean() < 4
    assert shown.splitlines()[-1] == b"out.png"


@pytest.mark.parametrize(
    ("answers", "environment", "asked"), [(plain, {}, True), (sixel, {"TERM": "dumb"}, False)], ids=["plain", "dumb"]
)
def test_a_terminal_without_graphics(tmp_path, answers, environment, asked):
    shown, queries, _ = in_terminal(tmp_path, answers, "generate", "a cat", *SIZE, *SMALL, **environment)
    assert bool(queries) == asked
    left = re.sub(rb"\x1b\[c|" + KITTY.pattern, b"", shown)
    assert left == b"out.png\r\n"


def test_without_a_terminal_nothing_is_shown_and_nothing_is_imported(tmp_path):
    script = (
        "import sys; from bagel_opt.cli.commands import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "generate", "a cat", *SIZE, *SMALL, "--think", "--max-think-tokens", "3"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-kitty"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    thought, path = done.stdout.splitlines()
    assert thought
    assert path == "out.png"
    assert "\x1b" not in done.stdout
    assert "bagel_opt.cli.terminal" in done.stderr
    assert "textual_image" not in done.stderr


class Terminal:
    def isatty(self):
        return True

    def fileno(self):
        return 0


@pytest.mark.parametrize("foreground", [True, False])
def test_a_process_in_the_background_asks_nothing(monkeypatch, foreground):
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp() + (not foreground))
    assert terminal._may_ask() == foreground


# ---- text out of files


STEERING = "\x1b]0;title\x07\x1b[31m[red]:smile:\x9b1m\u202e\ud800\x00"
SHOWN = r"\x1b]0;title\x07\x1b[31m[red]:smile:\x9b1m\u202e\ud800\x00"


def test_text_out_of_files_does_not_steer_the_terminal(capsys):
    table = Table(STEERING, title=STEERING)
    table.add_row(STEERING)
    for output in (tables(), PlainConsole(width=250, force_terminal=True, color_system=None)):
        output.print(table)
        output.print(STEERING)
        shown = capsys.readouterr().out
        assert shown.count(SHOWN) == 4
        assert not set(shown) & set("\x1b\x07\x9b\u202e\ud800\x00")


def test_a_message_does_not_steer_the_terminal(capsys):
    def fail():
        raise ValueError(STEERING)

    assert guarded(fail) == 1
    assert capsys.readouterr().err == f"bagel-opt: {SHOWN}\n"
    for error in (CheckpointError, BundleError, ProfileError):
        assert str(error(f"{STEERING}\n\r")) == SHOWN + r"\n\r"
        assert str(error(str(error(STEERING)))) == SHOWN  # told on, it stays the same
        assert str(error("Größe 10 × 12\t日本語 👩‍🔬")) == "Größe 10 × 12\t日本語 👩‍🔬"


def test_names_in_a_checkpoint_do_not_steer_the_terminal(tmp_path, capsys):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    edit_weights(folder, **{"\x1b[31mone\n[red]more": torch.zeros(1)})
    assert main(["inspect", str(folder)]) == 1
    assert capsys.readouterr().err == f"bagel-opt: {folder}: 1 tensor surplus: \\x1b[31mone\\n[red]more\n"


def test_what_the_hub_says_does_not_steer_the_terminal(monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError("\x1b[31mno\nsuch repo")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert main(["inspect", "owner/name"]) == 1
    assert capsys.readouterr().err.endswith("that can be downloaded: \\x1b[31mno\n")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["chat", "interleave"])
def test_an_answer_does_not_steer_the_terminal(monkeypatch, capsys, command, terminal):
    text = STEERING.replace("\ud800", "")

    class Answers:
        defaults = Options()

        def run(self, *args, on_output, **options):
            on_output(f"one\n{text}")
            return [f"one\n{text}"]

    monkeypatch.setattr("bagel_opt.cli.commands.load", lambda *args, **options: Answers())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main([command, "hello"]) == 0
    assert capsys.readouterr().out == "one\n" + (SHOWN.replace(r"\ud800", "") if terminal else text) + "\n"


# ---- the command that repeats


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        assert main([str(argument) for argument in argv]) == 0
        out, err = capsys.readouterr()
        [line] = [line for line in err.splitlines() if line.startswith("again: ")]
        return out, shlex.split(line.removeprefix("again: "))

    return call


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", 'it\'s a "cat" & $HOME', *SIZE, *SMALL, "-o", "a cat.png"],
        ["generate", *SMALL, *SIZE, "--", "--a cat"],
        ["edit", INPUT, "make it red", *SMALL, "--cfg_interval", "0", "1"],
    ],
)
def test_the_command_gives_the_same_bytes(run, argv):
    out, (program, *command) = run(*argv)
    path = Path(out.strip())
    first = path.read_bytes()
    assert program == "bagel-opt"
    assert sorted(command) == sorted([*map(str, argv), "--seed", command[command.index("--seed") + 1]])
    path.unlink()
    assert run(*command) == (out, ["bagel-opt", *command])  # and names itself
    assert path.read_bytes() == first
    path.unlink()
    run(*argv)
    assert path.read_bytes() != first  # another seed


def test_a_seed_that_was_given_is_not_given_again(run):
    argv = ["generate", "a cat", *SIZE, *SMALL, "--seed", "7"]
    assert run(*argv)[1] == ["bagel-opt", *argv]
    assert run("generate", "a cat", *SIZE, *SMALL, "--see=7")[1].count("--seed") == 0  # argparse takes prefixes
