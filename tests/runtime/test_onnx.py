"""The runtime of ONNX bundles."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError
from bagel_opt.files.manifest import read_manifest
from bagel_opt.runtime.onnx import OnnxRuntime


def test_caches_are_updated_in_place(bundle):
    """Bound as input and output to one memory: what a program did not write stays what it was."""
    runtime = OnnxRuntime(bundle, read_manifest(bundle))
    caches = runtime.caches(3, 768)
    for cache in caches:
        cache[:] = 7
    ids, one = np.full((1, 64), 5), np.array([10])
    runtime.run("text", [ids, one, one], caches, rows=1)
    for cache in caches:
        assert (cache[[0, 2]] == 7).all()
        assert (cache[1, :10] == 7).all()
        assert (cache[1, 74:] == 7).all()
        assert (cache[1, 10:74] != 7).any()


def test_a_file_of_another_program_is_named(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    shutil.copyfile(bundle / "decode.onnx", copy / "text.onnx")
    runtime = OnnxRuntime(copy, read_manifest(copy))
    with pytest.raises(BundleError, match=r"text\.onnx is not the program that the manifest tells of"):
        runtime.session("text")
    runtime.session("decode")


def test_bundles_run_without_torch(bundle, tmp_path):
    """In a process where torch cannot be imported: the same picture for the same seed."""
    script = f"""
import sys
sys.modules["torch"] = None
import bagel_opt
from bagel_opt.export import export
model = bagel_opt.load({str(bundle)!r})
events = []
model.generate("a red circle", seed=3, num_timesteps=4, height=64, width=64, on_step=events.append).save("out.png")
assert type(events[0].x_t).__module__ == "numpy"
for call in (lambda: bagel_opt.load({str(CHECKPOINT)!r}), lambda: export({str(CHECKPOINT)!r}, "out", "tiny")):
    try:
        call()
    except ImportError as error:
        assert "pip install" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    expected = bagel_opt.load(bundle).generate("a red circle", seed=3, num_timesteps=4, height=64, width=64)
    difference = np.asarray(Image.open(tmp_path / "out.png")).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1
