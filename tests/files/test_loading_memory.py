"""The memory that reading a checkpoint takes, and writing it in 8 bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_checkpoint import make, sizes_for
from support import ROOT


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make(tmp_path_factory.mktemp("large"), dtype=torch.bfloat16, **sizes_for(150_000_000))


PEAK = """
import sys, torch
from bagel_opt.files.checkpoint import Checkpoint

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def load(folder):
    return Checkpoint(folder).load(torch.device("cpu"), getattr(torch, sys.argv[3]))

load(sys.argv[1])  # what libraries take once
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
except OSError:
    pass
before = memory("VmRSS")
model = load(sys.argv[2])
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.second)])
def test_memory_while_loading(small, large, dtype):
    """The weights once, and little of the bfloat16 file at a time."""
    command = [sys.executable, "-c", PEAK, small, large, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.2


WRITE = """
import sys
from pathlib import Path
from bagel_opt.export.quantize import quantize

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

quantize(sys.argv[1], sys.argv[3] + "/small", "fp8")  # what libraries take once
try:
    open("/proc/self/clear_refs", "w").write("5")
except OSError:
    pass
before = memory("VmRSS")
quantize(sys.argv[2], sys.argv[3] + "/large", "fp8")
print((memory("VmHWM") - before) / (Path(sys.argv[2]) / "ema.safetensors").stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_while_quantising(small, large, tmp_path):
    """Some tensors of the file at a time, in float32: what is written takes 0.6 of the file by itself."""
    command = [sys.executable, "-c", WRITE, small, large, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.6
