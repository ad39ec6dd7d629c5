"""Exports that are killed leave nothing that loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundles import export_quickly
from support import CHECKPOINT, ROOT

import bagel_opt
from bagel_opt import BundleError, CheckpointError
from bagel_opt.export.torch_packages import check_loads
from bagel_opt.files.manifest import MANIFEST, read_manifest

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import bagel_opt
from bagel_opt.export import export
from bagel_opt import Profile
import torch.export, safetensors.torch, bagel_opt.export.torch_packages

checkpoint, folder, first, count = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
if programs := sys.argv[5:]:  # these alone, so that an export takes less
    sys.path.insert(0, os.environ["TESTS"])
    import bundles
    few = bundles.few_programs(*programs)
    few.__enter__()  # for as long as it is kept

profile = Profile("small", rows=1, slots=160, text=16, patches=16, latents=16)

def start(number):
    out = folder / str(number) / "bundle"
    out.parent.mkdir()
    child = os.fork()
    if not child:
        export(checkpoint, out, profile, format="export")
        os._exit(0)
    return child

begun = time.monotonic()
os.waitpid(start(-first - 1), 0)
whole = time.monotonic() - begun
for number in range(first, first + count):
    child = start(number)
    time.sleep(random.Random(number).random() * whole)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1])
"""


def test_killing_an_export_leaves_nothing_that_loads(tmp_path, thorough):
    """Eight times, at random moments of about the time that it takes; in the first tier four times, with few programs."""
    each, programs = (4, []) if thorough else (2, ["choose", "step", "decode", "taylor_update"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLS, str(CHECKPOINT), str(tmp_path), str(first), str(each), *programs],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TESTS": str(ROOT / "tests")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, each)
    ]
    ends = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert len(ends) == 2 * each
    assert ends.count(9) >= each  # killed; the others had finished
    folders = [path for number in range(2 * each) for path in (tmp_path / str(number)).iterdir()]
    assert len(folders) >= each // 2  # on their way
    whole = {path.parent for path in folders if path.name == "bundle" and (path / MANIFEST).exists()}
    assert len(whole) <= ends.count(0) + 1
    for path in folders:
        if path.parent not in whole:
            with pytest.raises((BundleError, CheckpointError, FileNotFoundError)):
                bagel_opt.load(path)


DIES = """
import os, sys
from pathlib import Path
import bundles
import bagel_opt.export.torch_packages  # what a child would import by itself

ready, folder = map(Path, sys.argv[1:3])
for die in sys.argv[3:]:
    child = os.fork()
    if not child:
        bundles.export_quickly(ready, folder / die, int(die))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("replaces", [False, True])
def test_dying_at_the_last_steps_leaves_nothing_wrong(tmp_path, two, replaces):
    """At each renaming and removal: the old bundle and the new one are both whole or do not load, one of them is there
    where one was before, and a new export cleans up."""
    files = len(read_manifest(two).files) if replaces else 0
    removals = [4, 5, 4 + files, 5 + files, 6 + files, 7 + files] if replaces else [3]
    steps = [1, 2, *removals, removals[-1] + 1]
    for step in steps if replaces else ():
        shutil.copytree(two, tmp_path / str(step) / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", DIES, two, tmp_path, *map(str, steps)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        timeout=300,
    )
    assert [int(line) for line in done.stdout.split()] == [9] * (len(steps) - 1) + [0]
    for step in steps:
        folder, whole = tmp_path / str(step), 0
        for path in filter(Path.is_dir, folder.iterdir()):
            if (path / MANIFEST).exists():
                bagel_opt.load(path)
                whole += 1
            else:
                with pytest.raises((BundleError, CheckpointError, FileNotFoundError)):
                    bagel_opt.load(path)
        assert whole or not replaces
        assert (folder / "bundle" / MANIFEST).exists() == (step > 2 + replaces or (replaces and step == 1))
        if step != 5 + files:  # once is enough of those that differ little
            export_quickly(two, folder)
            assert [path.name for path in folder.iterdir()] == ["bundle"]
            bagel_opt.load(folder / "bundle")


def test_a_package_that_torch_cannot_load_is_told_in_one_line(tmp_path):
    package = tmp_path / "text.whole.pt2"
    package.write_bytes(b"no library")
    with pytest.raises(
        ChildProcessError, match=r"text\.whole\.pt2: torch .* cannot load what the C\+\+ compiler"
    ) as caught:
        check_loads(str(package), torch.device("cpu"))
    assert "\n" not in str(caught.value)
