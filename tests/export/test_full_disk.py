"""Exports that find no space: one line, nothing left behind, and the old bundle whole."""

import resource
import shutil
from collections import namedtuple

import pytest
from bundles import ONE, few_programs, traced_here
from support import CHECKPOINT, forked

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.export import bundle, export, placing
from bagel_opt.files import torch_weights


def export_to_a_full_disk(out, format, where):
    """No file may grow beyond some bytes, from the moment at which weights or programs are written: as on a full disk,
    writing fails, with another number."""
    module = {"_write_programs": bundle, "write_weights": torch_weights}[where]
    write = getattr(module, where)

    def fills(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
        return write(*arguments)

    setattr(module, where, fills)
    words = ["export", "--checkpoint", CHECKPOINT, "--out", out, "--format", format, "--profile", "tiny"]
    with few_programs("choose"), traced_here():
        return main(list(map(str, words)))


@pytest.mark.parametrize(
    ("format", "where"), [("export", "_write_programs"), ("onnx", "_write_programs"), ("export", "write_weights")]
)
def test_a_full_disk_is_told_in_one_line(tmp_path, small_bundle, format, where):
    """torch 2.13's writer of archives ends the process where it cannot write."""
    out = shutil.copytree(small_bundle, tmp_path / "bundle")
    done = forked(export_to_a_full_disk, out, format, where)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"bagel-opt: [Errno 27] File too large: '{out}'"]
    assert list(tmp_path.iterdir()) == [out]
    bagel_opt.load(out)


@pytest.mark.parametrize("format", ["export", "onnx"])
def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch, format):
    sizes, asked = namedtuple("usage", "total used free"), []
    monkeypatch.setattr(
        placing.shutil, "disk_usage", lambda path: asked.append(left.exists()) or sizes(10**9, 0, 5 * 10**6)
    )
    out, left = tmp_path / "bundle", tmp_path / "bundle.partial-12345678"
    left.mkdir()  # of an export that was killed: may be what fills the disk
    with pytest.raises(
        OSError, match=r"bundle: the weights take 0\.00583 GB, and 0\.005 GB are free there; free"
    ) as told:
        export(CHECKPOINT, out, ONE, format=format)
    assert "\n" not in str(told.value)
    assert asked == [False]
    assert list(tmp_path.iterdir()) == []
