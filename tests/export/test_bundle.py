"""Exporting: what is refused, what is replaced, and what an interruption leaves."""

import json
import shutil
import subprocess

import pytest
from bundles import few_programs
from support import CHECKPOINT

from bagel_opt import Profile
from bagel_opt.export import export, processes
from bagel_opt.export.placing import check_replaceable
from bagel_opt.files.manifest import MANIFEST

PROFILE = Profile("test", 2, 600, 64, 64, 64)


def test_export_refuses_bad_settings(tmp_path):
    for settings, error in (
        ({"format": "onyx"}, "format='onyx'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=error):
            export(CHECKPOINT, tmp_path / "out", PROFILE, **settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(CHECKPOINT, tmp_path / "out", "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="no bundle"):
        export(CHECKPOINT, tmp_path / "mine", PROFILE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    def interrupt(what, *_):
        if what.startswith("exported"):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", Started)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 1)
    with few_programs("choose", "step"), pytest.raises(KeyboardInterrupt):
        export(CHECKPOINT, tmp_path / "out", PROFILE, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert started
    assert all(process.returncode is not None for process in started)


def test_what_fails_in_another_process_is_told():
    with pytest.raises(RuntimeError, match=r"a process of the export failed with status 1: (?s:.*)takes 1 positional"):
        list(processes.in_processes("textwrap:dedent", "wide", [1, 2]))


def test_only_what_an_export_wrote_is_replaced(tmp_path, bundle):
    foreign, mixed = tmp_path / "app", shutil.copytree(bundle, tmp_path / "mixed")
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"name": "a web app"}')
    (mixed / "notes.txt").write_text("precious")
    for folder in (foreign, mixed):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(FileExistsError, match="no bundle"):
            export(CHECKPOINT, folder, PROFILE)
        assert sorted(path.name for path in folder.iterdir()) == before
    older = shutil.copytree(bundle, tmp_path / "older")
    check_replaceable(older)
    manifest = json.loads((older / MANIFEST).read_text())
    (older / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    check_replaceable(older)  # which no longer loads, so it is to be exported again
    (older / "text.onnx").unlink()
    check_replaceable(older)  # told to export it again, too
    (older / "notes.txt").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match=r"no bundle, or not only: no export wrote notes\.txt"):
        check_replaceable(older)
