"""Every command and every Python block of the README files is run here, or says in a comment above it why it is not.

A block is fenced, with its language. Its marker, if any, is an HTML comment on the line above:
`not run: REASON`; `server`, which is started, waited for and stopped at the end; `file: NAME`, which is written there.
The blocks of a README run in order, in one empty folder; its Python blocks share their names. -s lists those not run.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import PROFILES, keep

from bagel_opt.cli.arguments import parser
from bagel_opt.cli.commands import COMMANDS as OURS
from bagel_opt.loading import shipped_model

ROOT = Path(__file__).parent.parent
NAMES = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("README.md"))]
NAMES = [str(name) for name in NAMES if not re.search(r"(^|/)\.|^tests/golden", str(name))]
RUN, DATA = ("sh", "python"), ("toml", "ini", "json", "dockerfile", "text")
REASONS = {
    "29 GB",
    "export/README.md has its like",
    "installs packages",
    "needs a GPU",
    "needs the weights of Lance",
    "needs an account",
    "needs a container engine",
    "needs the official code",
    "runs the tests",
    "serves until it is stopped",
    "starts a cluster",
    "takes minutes",
}
COMMANDS = {"$", "bagel-opt", "curl", "git", "make", "pip", "podman", "pytest", "python", "python3", "ray", "serve"}
# Of the model that ships, with no other settings.
EXPORT = re.compile(r"^python -m bagel_opt\.export --out (\w+)(?= +#|$)", re.M)
STEPS = re.compile(r"(num[-_]timesteps\W+)\d+")
FEWEST = 4  # timesteps, however many a README names: they change how good a picture is, which is not looked at
BLOCK = re.compile(r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    marker: str
    line: int

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return self.marker.removeprefix("not run: ") if self.marker.startswith("not run: ") else None


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        yield Block(found["language"], found["text"], found["marker"] or "", text[: found.start()].count("\n") + 1)


def commands(text: str) -> str:
    """Of all shell blocks."""
    return "".join(block.text for block in blocks(text) if block.language == "sh")


def head(line: str) -> str:
    """What a line would call: its first word, without folders."""
    return line.strip().partition(" ")[0].rpartition("/")[2]


def problems(text: str, known: str) -> list[str]:
    """What in a README could be taken for a command and is neither run nor marked. known: the commands that are."""
    found = []
    for block in blocks(text):
        right = block.reason in REASONS or not block.marker
        right |= block.marker == "server" and block.language == "sh"
        right |= block.marker.startswith("file: ") and block.language in DATA
        if block.language not in RUN + DATA or not right:
            found.append(f"line {block.line}: a block of {block.language!r} marked {block.marker!r}")
        if block.language == "text" and (called := COMMANDS.intersection(map(head, block.text.splitlines()))):
            found.append(f"line {block.line}: {', '.join(called)} in a block of text")
    rest = BLOCK.sub("", text)
    found += [f"{line!r} is fenced, marked or indented by itself" for line in re.findall(r"^.*(?:```|~~~|<!--|<pre).*$|^(?: {4}|\t).*$", rest, re.M)]  # fmt: skip
    for span in re.findall(r"`([^`]+)`", rest):
        if len(span.split()) > 1 and head(span) in COMMANDS and span not in known:
            found.append(f"`{span}` stands in no block")
    return found


def broken_links(name: str) -> list[str]:
    """Relative links to files that are not there, or to headings that they do not have."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", read(name))):
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if ":" not in link and (not target.exists() or (heading and heading not in headings(target.read_text()))):
            broken.append(link)
    return broken


def headings(text: str) -> set[str]:
    """As GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(command: list[str], port: int, **settings) -> Iterator[None]:
    process = subprocess.Popen(command, start_new_session=True, **settings)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
                break
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def run(name: str, folder: Path, exported: list[Path], shims: Path) -> None:
    """Runs a README's blocks. Whoever listens on port 8000 there listens on a free one here. exported: the bundle of the
    model that ships, once a README has exported it; the others copy it where they have the same command. shims: programs in
    place of those that import torch anew, but for servers."""
    port, namespace = free_port(), {}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    settings = {"cwd": folder, "env": {**os.environ, **paths}}
    quick = {"cwd": folder, "env": {**os.environ, **paths, "PATH": f"{shims}:{paths['PATH']}"}}
    with contextlib.ExitStack() as stack:
        for block in blocks(read(name)):
            text = STEPS.sub(rf"\g<1>{FEWEST}", re.sub(r"\b8000\b", str(port), block.text))
            runs = block.reason is None and block.language == "sh"
            made = EXPORT.search(text) if runs else None
            if made and exported:
                text = EXPORT.sub(f"cp -r {exported[0]} {made[1]}", text)
            shell = ["bash", "-eu", "-o", "pipefail", "-c", text]
            if block.marker.startswith("file: "):
                (folder / block.marker.removeprefix("file: ")).write_text(text)
            elif runs and block.marker == "server":
                stack.enter_context(server(shell, port, **settings))
            elif runs:
                subprocess.run(shell, check=True, timeout=1200, **quick)  # such as a server that is not marked
                if made and not exported:
                    exported.append(folder / made[1])
                    keep(exported[0], shipped_model(), PROFILES[shipped_model()])
            elif block.reason is None and block.language == "python":
                with contextlib.chdir(folder):
                    exec(compile("\n" * block.line + text, name, "exec"), namespace)


@pytest.fixture(scope="module")
def exported():
    return []


@pytest.mark.second
@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name, tmp_path, exported, zygote):
    run(name, tmp_path, exported, zygote.shims())


def test_each_command_is_run_or_marked():
    known = "".join(commands(read(name)) for name in NAMES)
    assert not {name: wrong for name in NAMES if (wrong := problems(read(name), known))}


def test_no_reason_is_idle():
    marked = [(name, block) for name in NAMES for block in blocks(read(name)) if block.reason]
    for name, block in marked:
        print(f"{name}:{block.line} {block.reason}: {block.text.splitlines()[0]}")
    assert {block.reason for _, block in marked} == REASONS


def test_what_is_not_run_can_be_read():
    for block in (block for name in NAMES for block in blocks(read(name)) if block.reason):
        if block.language == "python":
            compile(block.text, "README.md", "exec")
        for line in block.text.replace("python -m bagel_opt.export", "bagel-opt export").splitlines():
            if line.startswith("bagel-opt"):
                parser(OURS).parse_args(shlex.split(line, comments=True)[1:])


def test_links_lead_somewhere():
    assert not {name: broken for name in NAMES if (broken := broken_links(name))}


def test_the_front_page_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 140
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "text",
    [
        "```\nmake it\n```",
        "```bash\nmake it\n```",
        "~~~sh\nmake it\n~~~",
        "    make it",
        "<pre>make it</pre>",
        "```text\nmake it\n```",
        "<!-- not run: no time -->\n```sh\nmake it\n```",
        "<!-- not run: 29 GB -->\n\n```sh\nmake it\n```",
        "<!-- server -->\n```python\nmake()\n```",
        "<!-- file: a.sh -->\n```sh\nmake it\n```",
        "Use `make it`.",
        "Use `.venv/bin/pytest -s`.",
    ],
)
def test_what_is_wrong_is_found(text):
    assert problems(text, "make that\n")


def test_what_is_right_passes():
    text = "<!-- not run: 29 GB -->\n```sh\nmake it\n```\nUse `make it`, `--make it` and `make`.\n```python\n1\n```\n"
    assert not problems(text, commands(text))
