"""Exports that find no space: one line, nothing left behind, and the old bundle whole."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from bundles import ONE
from support import CHECKPOINT, ROOT

import bagel_opt
from bagel_opt.export import export, placing

# No file may grow beyond some bytes, from the moment at which weights or programs are written: as on a full disk, writing
# fails, with another number.
FULL = """
import resource, sys
import bundles
from bagel_opt.cli.commands import main
from bagel_opt.export import bundle
from bagel_opt.files import torch_weights

checkpoint, out, format, where = sys.argv[1:]
module = {"_write_programs": bundle, "write_weights": torch_weights}[where]
write = getattr(module, where)

def fills(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    return write(*arguments)

setattr(module, where, fills)
with bundles.few_programs("choose"):
    raise SystemExit(main(["export", "--checkpoint", checkpoint, "--out", out, "--format", format, "--profile", "tiny"]))
"""


@pytest.mark.parametrize(
    ("format", "where"), [("export", "_write_programs"), ("onnx", "_write_programs"), ("export", "write_weights")]
)
def test_a_full_disk_is_told_in_one_line(tmp_path, two, format, where):
    """torch 2.13's writer of archives ends the process where it cannot write."""
    out = shutil.copytree(two, tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", FULL, CHECKPOINT, out, format, where],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
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
