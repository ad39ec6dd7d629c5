"""What forks from the zygote is as a process of its own."""

import os
import select
import signal
import subprocess
import sys

import pytest
import zygote as zygotes

pytestmark = pytest.mark.second
TOLD = "import os, sys; print(sys.argv, os.getcwd(), os.environ['A'], 'torch' in sys.modules, 'bagel_opt' in sys.modules, input())"


@pytest.fixture(scope="module")
def zygote():
    """One that nobody has asked yet. After the first process, which is a new one, others fork."""
    with zygotes.zygote() as made:
        assert made.popen([sys.executable, "-c", "import sys; assert 'torch' not in sys.modules"]).wait(60) == 0
        yield made


def run(zygote, script, **settings):
    path = f"{zygote.shims()}:{os.environ['PATH']}"
    settings["env"] = {**os.environ, "A": "b", "PATH": path}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, **settings)


def test_it_has_arguments_streams_folder_environment_and_status(zygote, tmp_path):
    done = run(zygote, f'echo in | python -c "{TOLD}; sys.exit(3)" x "y z" > out; echo $?', cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("3\n", "")
    assert (tmp_path / "out").read_text() == f"['-c', 'x', 'y z'] {tmp_path} b True False in\n"


def test_what_it_raises_ends_it(zygote):
    done = run(zygote, "python -c '1 / 0'")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_modules_and_programs_run(zygote):
    for _ in range(2):  # first a new process, then a fork
        for command in ("bagel-opt --version", "python -m bagel_opt --version"):
            assert run(zygote, command).stdout.startswith("bagel-opt ")
        assert run(zygote, "python -m bagel_opt --none").returncode == 2


def test_it_can_be_waited_for_and_killed(zygote):
    process = zygote.popen([sys.executable, "-c", "import signal; signal.pause()"], stdin=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    os.kill(process.pid, 0)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_it_ends_with_who_asked(zygote):
    out, its = os.pipe()
    process = zygote.popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[its])
    os.close(its)
    process.answers.close()
    process.link.close()
    with open(out) as end:
        assert select.select([end], [], [], 60)[0]  # it is gone
        assert end.read() == ""
