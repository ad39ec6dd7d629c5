"""Work in other processes: it needs no `__main__` guard, and says what went wrong."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import bagel_opt
from bagel_opt.export import processes
from bagel_opt.export.torch_packages import compile_all

ROOT = Path(bagel_opt.__file__).parents[1]
UNGUARDED = """
print("started", flush=True)
import sys
from bagel_opt.export.processes import in_processes
sys.path.append(sys.argv[1])
print(*in_processes("answering:answers", 1, [1]), flush=True)
"""


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    """multiprocessing runs it again in each process, and then blames memory or the compiler."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, Path(__file__).parent], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.stdout, done.stderr) == ("started\n2\n", "")


def test_results_come_from_all_processes():
    assert sorted(processes.in_processes("answering:answers", 10, [1, 2, 3, 4])) == [11, 12, 13, 14]


def test_an_error_of_the_machine_keeps_its_type_and_its_place():
    with pytest.raises(FileNotFoundError, match="no such thing") as caught:
        list(processes.in_processes("answering:answers", 0, ["refuse"]))
    assert "in answers" in "".join(caught.value.__notes__)


def test_a_process_that_dies_is_told_by_its_status():
    with pytest.raises(processes.ProcessDiedError, match="failed with status 7"):
        list(processes.in_processes("answering:answers", 0, ["die"]))


def test_a_compiling_process_that_dies_is_told_in_one_line(tmp_path, monkeypatch):
    """As where a library crashes as it is loaded."""
    (tmp_path / "text.whole.pt2").write_bytes(b"")
    original = subprocess.Popen

    def killed(*arguments, **options):
        process = original(*arguments, **options)
        threading.Thread(target=lambda: (time.sleep(0.05), process.kill()), daemon=True).start()
        return process

    monkeypatch.setattr(processes.subprocess, "Popen", killed)
    with pytest.raises(ChildProcessError, match="a process that compiles its programs died") as caught:
        compile_all(tmp_path, lambda *_: None)
    assert "\n" not in str(caught.value)
