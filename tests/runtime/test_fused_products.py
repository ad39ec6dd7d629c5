"""quack-kernels that are absent or fail; what they compute is tested on a GPU (tests/gpu/)."""

import sys
from types import SimpleNamespace

import pytest
import torch
from broken import packages

from bagel_opt.runtime import fused_products
from bagel_opt.runtime import two_streams as streams
from bagel_opt.runtime.torch_setup import register_kernels

CPU, HALF = torch.device("cpu"), torch.bfloat16  # stands for a GPU, of the capability that `hopper` says
CONFIG = "class GemmConfig:\n    def __init__(self, **_): ..."
INTERFACE = "import torch\ndef gemm_act(*_, **__): {}"
KEPT = "import os; os.environ['QUACK_CACHE_DIR']"  # which is read as it is imported
WORKS = {"quack": KEPT, "quack__gemm_config": CONFIG, "quack__gemm_interface": INTERFACE.format("return None, None")}
FAILS = WORKS | {"quack__gemm_interface": INTERFACE.format("raise TypeError('cannot fingerprint\\nmore')")}


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_absent_ones_are_not_warned_of(hopper, tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path):
        assert not fused_products.usable(CPU, HALF)
        assert fused_products.fault(CPU, HALF) == "not installed"
        assert fused_products.described(CPU, HALF, {None}) == "none"
        assert not fused_products.usable(CPU, torch.float32)
    assert lines(caplog) == []


@pytest.mark.parametrize("kinds", [{None}, {"int4"}, {"int8"}, {None, "int8"}])
def test_those_that_work(kinds, hopper, tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path, **WORKS):
        assert fused_products.usable(CPU, HALF)
        told = fused_products.described(CPU, HALF, kinds)
    assert told == {1: "none", 2: "quack-kernels (not in int8)"}[len(kinds)] if "int8" in kinds else "quack-kernels"
    assert lines(caplog) == []


def test_those_that_fail_are_told_of_once_with_what_is_known_of_it(hopper, tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path, **FAILS, nvidia_cutlass_dsl=""):
        assert [fused_products.usable(CPU, HALF) for _ in range(2)] == [False, False]
    [line] = lines(caplog)
    assert line.startswith(
        "quack-kernels is installed but fails here (TypeError: cannot fingerprint), so layers run without it, more slowly; "
        f"nvidia-cutlass-dsl lies in {tmp_path}/nvidia_cutlass_dsl, and works in a folder named site-packages or dist-pack"
    )


def test_those_that_cannot_be_imported(hopper, tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path, quack="import cutlass_that_is_not_there"):
        assert not fused_products.usable(CPU, HALF)
    assert "(No module named 'cutlass_that_is_not_there')" in lines(caplog)[0]


def test_an_older_quack_has_no_products_of_8_bit_floats(hopper, tmp_path, monkeypatch, caplog):
    """Loading must not end for it."""
    monkeypatch.delitem(sys.modules, "bagel_opt.runtime.fused_fp8", raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    with packages(monkeypatch, tmp_path, **WORKS):
        way = streams.TwoStreams(CPU, HALF, codes=True).way
        assert (way.fused, way.fp8) == (True, None)
        assert fused_products.described(CPU, HALF, {None, "fp8"}) == "quack-kernels (not in fp8)"
    [line] = lines(caplog)
    assert line.startswith(
        "quack-kernels is installed but fails here with 8-bit floats (ModuleNotFoundError: No module"
    )


def test_quantised_products_without_triton(tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path, triton="raise ImportError('libcuda.so.1')"):
        register_kernels(torch.device("cuda"))
    assert lines(caplog) == [
        "Triton cannot be imported (libcuda.so.1), so quantised products run by torch's own kernels, much more slowly; pip "
        "install triton"
    ]
