"""Putting bundles in place while others are at work: other exports, and whoever puts files there."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import export_quickly
from support import exit_with

import bagel_opt
from bagel_opt.export import placing
from bagel_opt.files.manifest import MANIFEST


@pytest.mark.parametrize("old", ["bundle", "empty", "none"])
def test_what_came_there_meanwhile_stays(tmp_path, small_bundle, old):
    """And so does the old bundle; the new one lies beside."""
    out = tmp_path / "bundle"
    if old == "bundle":
        shutil.copytree(small_bundle, out)
    elif old == "empty":
        out.mkdir()

    def meanwhile(_):
        (out / "my notes").mkdir(parents=True)
        (out / "my notes" / "a.txt").write_text("precious")

    with pytest.raises(
        FileExistsError, match=r"no export wrote my notes.*; the new bundle is in .*bundle\.new-1$"
    ) as told:
        export_quickly(small_bundle, tmp_path, meanwhile=meanwhile)
    assert "\n" not in str(told.value)
    assert (out / "my notes" / "a.txt").read_text() == "precious"
    assert (out / MANIFEST).exists() == (old == "bundle")
    if old == "bundle":
        bagel_opt.load(out)
    bagel_opt.load(tmp_path / "bundle.new-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.new-1"]


def test_what_comes_there_in_the_last_moment_stays(tmp_path, small_bundle, monkeypatch):
    """Between the last look and the renaming."""
    out, check = shutil.copytree(small_bundle, tmp_path / "bundle"), placing.check_replaceable
    checks = []

    def late(folder):
        check(folder)
        checks.append(folder)
        if len(checks) == 2:
            (out / "notes.txt").write_text("precious")

    monkeypatch.setattr(placing, "check_replaceable", late)
    with pytest.raises(FileExistsError, match=r"bundle is the new bundle; .* is in .*-old$") as told:
        export_quickly(small_bundle, tmp_path)
    bagel_opt.load(out)
    left = Path(str(told.value).rpartition(" ")[2])
    assert [path.name for path in left.iterdir()] == ["notes.txt"]
    export_quickly(small_bundle, tmp_path)  # which cleans up
    assert (left / "notes.txt").read_text() == "precious"


def test_where_it_cannot_be_put_the_new_bundle_lies_beside(tmp_path, small_bundle, monkeypatch):
    """As where the folder is one that the system holds."""
    out, rename = shutil.copytree(small_bundle, tmp_path / "bundle"), Path.rename

    def refuse(path, to):
        if to == out and "partial" in path.name and "old" not in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*; the new bundle is in .*bundle\.new-1$"):
        export_quickly(small_bundle, tmp_path)
    for folder in (out, tmp_path / "bundle.new-1"):
        bagel_opt.load(folder)
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_with_like_names_are_left_alone(tmp_path, small_bundle):
    others = [tmp_path / name for name in ("bundle.old-1", "bundle-partial", "bundlepartial-1", "bundle2.partial-1")]
    for folder in others:
        shutil.copytree(small_bundle, folder)
    export_quickly(small_bundle, tmp_path)
    for folder in (*others, tmp_path / "bundle"):
        bagel_opt.load(folder)


def test_of_two_exports_at_once_in_threads_one_is_refused(tmp_path, small_bundle):
    first, second = threading.Event(), threading.Event()

    def hold(_):
        first.set()
        assert second.wait(60)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(export_quickly, small_bundle, tmp_path, meanwhile=hold)
        try:
            assert first.wait(60)
            with pytest.raises(FileExistsError, match=r"another export to .*bundle runs; wait for it") as told:
                export_quickly(small_bundle, tmp_path)
            assert "\n" not in str(told.value)
        finally:
            second.set()
        assert running.result() == tmp_path / "bundle"
    bagel_opt.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_exports_at_once_in_processes_one_is_refused(tmp_path, small_bundle, killed):
    """Until the other has ended, however it ends."""
    (written, tell), (wait, go_on) = os.pipe(), os.pipe()
    other = os.fork()
    if not other:
        os.close(go_on)
        exit_with(export_quickly, small_bundle, tmp_path, None, lambda _: (os.write(tell, b"!"), os.read(wait, 1)))
    os.close(tell)
    assert os.read(written, 1)
    with pytest.raises(FileExistsError, match=r"another export to .*bundle runs"):
        export_quickly(small_bundle, tmp_path)
    if killed:
        os.kill(other, signal.SIGKILL)
    os.close(go_on)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == (-9 if killed else 0)
    for end in (written, wait):
        os.close(end)
    assert (tmp_path / "bundle").exists() == (not killed)
    export_quickly(small_bundle, tmp_path)
    bagel_opt.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_many_at_once_leave_a_whole_bundle(tmp_path, small_bundle):
    """Each ends well or is refused, and one ends well."""

    def one(number):
        time.sleep(number / 100)
        with placing.put_in_place(tmp_path / "bundle") as partial:
            shutil.copytree(small_bundle, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
            shutil.copy(small_bundle / MANIFEST, partial / placing.UNFINISHED)

    with ThreadPoolExecutor(8) as pool:
        ends = [future.exception() for future in [pool.submit(one, number) for number in range(24)]]
    assert None in ends
    assert {str(end).split(" to ")[0] for end in ends} <= {"None", "another export"}
    bagel_opt.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
