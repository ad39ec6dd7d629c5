"""Exports that are killed leave nothing that loads."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from bundles import ONE, export_quickly, few_programs
from support import CHECKPOINT, exit_with, forked

import bagel_opt
from bagel_opt import BundleError, CheckpointError
from bagel_opt.export import export
from bagel_opt.export.torch_packages import check_loads
from bagel_opt.files.manifest import MANIFEST, read_manifest

FEW = ("choose", "step", "taylor_update", "tea_change")


def export_few(out):
    with few_programs(*FEW):
        export(CHECKPOINT, out, ONE, format="export")


def test_killing_an_export_leaves_nothing_that_loads(tmp_path, thorough):
    """At random moments of about the time that it takes."""
    count, ends = 8 if thorough else 4, []
    export_few(tmp_path / "first")  # in this process, which imports what its forks need
    begun = time.monotonic()
    assert forked(export_few, tmp_path / "whole").returncode == 0
    took = time.monotonic() - begun
    for number in range(count):
        child = os.fork()
        if not child:
            exit_with(export_few, tmp_path / str(number) / "bundle")
        time.sleep(random.Random(number).random() * took)
        os.kill(child, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert ends.count(-9) >= count // 2  # the others had finished
    folders = [path for number in range(count) for path in (tmp_path / str(number)).glob("*")]
    assert len(folders) >= count // 4  # on their way
    whole = {path.parent for path in folders if path.name == "bundle" and (path / MANIFEST).exists()}
    assert len(whole) <= ends.count(0) + 1
    for path in folders:
        if path.parent not in whole:
            with pytest.raises((BundleError, CheckpointError, FileNotFoundError)):
                bagel_opt.load(path)


@pytest.mark.parametrize("replaces", [False, True])
def test_dying_at_the_last_steps_leaves_nothing_wrong(tmp_path, small_bundle, replaces):
    """At each renaming and removal: the old bundle and the new one are both whole or do not load, one of them is there
    where one was before, and a new export cleans up."""
    files = len(read_manifest(small_bundle).files) if replaces else 0
    removals = [4, 5, 4 + files, 5 + files, 6 + files, 7 + files] if replaces else [3]
    steps = [1, 2, *removals, removals[-1] + 1]
    for step in steps if replaces else ():
        shutil.copytree(small_bundle, tmp_path / str(step) / "bundle")
    ends = [forked(export_quickly, small_bundle, tmp_path / str(step), step).returncode for step in steps]
    assert ends == [9] * (len(steps) - 1) + [0]
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
            export_quickly(small_bundle, folder)
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
