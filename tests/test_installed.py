"""Libraries that are absent, broken or there, and compilers."""

import sys
import sysconfig

import pytest
from broken import packages

from bagel_opt import installed
from bagel_opt.installed import ABSENT, compiler, fault, mend_flash, missing


def test_what_is_absent_broken_or_there(tmp_path, monkeypatch):
    files = {
        "lacks": "import cutlass_that_is_not_there",
        "dies": "raise OSError('libnothing.so.12: cannot open shared object file\\nmore')",
        "silent": "raise AssertionError",
        "good": "def function(): ...",
        "outer__inner": "def function(): ...",  # outer has no code of its own
        "torn": "raise ImportError('undefined symbol: _ZN3c10')",
        "torn__inner": "",
    }
    with packages(monkeypatch, tmp_path, **files):
        assert fault("nowhere") == fault("good.inner") == fault("outer") == fault("nowhere.inner") == ABSENT
        assert fault("lacks") == "No module named 'cutlass_that_is_not_there'"
        assert fault("dies") == "libnothing.so.12: cannot open shared object file"
        assert fault("silent") == "AssertionError"
        assert fault("good", "function") is fault("outer.inner", "function") is None
        assert fault("good", "function", "other") == "it has no other"
        assert fault("torn.other") == ABSENT  # though what it would lie in is broken
        assert fault("torn.inner") == "undefined symbol: _ZN3c10"


def test_a_library_is_tried_once(tmp_path, monkeypatch):
    with packages(monkeypatch, tmp_path, counted="import sys; sys.tried = getattr(sys, 'tried', 0) + 1; raise OSError"):
        monkeypatch.setattr(sys, "tried", 0, raising=False)
        assert [fault("counted") for _ in range(3)] == ["OSError"] * 3
        assert sys.tried == 1


def test_where_nvidia_cutlass_dsl_lies(tmp_path, monkeypatch):
    assert mend_flash() == "pip install 'bagel-opt[flash]' installs what was tried together"
    with packages(monkeypatch, tmp_path / "target", nvidia_cutlass_dsl=""):
        assert (
            f"lies in {tmp_path}/target/nvidia_cutlass_dsl, and works in a folder named site-packages" in mend_flash()
        )
        assert "without pip's --target, by pip install 'bagel-opt[flash]'" in mend_flash()
    with packages(monkeypatch, tmp_path / "site-packages", nvidia_cutlass_dsl=""):
        assert "--target" not in mend_flash()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("...", name="torch.nested"), "it needs torch: pip install 'bagel-opt[torch]'"),
        (ModuleNotFoundError("...", name="sympy"), "it needs sympy: pip install 'bagel-opt[torch]'"),
        (
            OSError("libcudart.so.13: no"),
            "it needs torch, which cannot be imported here (libcudart.so.13: no): pip install",
        ),
    ],
)
def test_whoever_needs_a_library_says_what_is_wrong_with_it(error, says):
    assert str(missing("it", "torch", error, "torch")).startswith(says)


def test_compilers(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    assert compiler("cpu") == (inductor.cpp.cxx[1], "", "") or compiler("cpu").do
    with packages(monkeypatch, tmp_path, triton=""):
        assert compiler("cuda") == ("Triton", "", "")
    with packages(monkeypatch, tmp_path, triton="raise ImportError('libcuda.so.1')"):
        assert compiler("cuda") == ("Triton", "Triton cannot be imported (libcuda.so.1)", "pip install triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    installed.fault.cache_clear()
    assert compiler("cuda").why == "Triton is not installed"
    installed.fault.cache_clear()
    with inductor.patch("cpp.cxx", (None, "/nowhere/g++")):
        found = compiler("cpu")
    assert found.why.startswith("No working C++ compiler found")
    assert found.do == "install a C++ compiler, such as g++, or name one by CXX"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the headers may lie in other places")
def test_a_compiler_without_the_headers_of_python(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    works = tmp_path / "g++"
    works.write_text("#!/bin/sh\n")
    works.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    with inductor.patch("cpp.cxx", (None, str(works))):
        assert compiler("cpu").why == f"there is no {tmp_path}/Python.h"
        (tmp_path / "Python.h").touch()
        assert compiler("cpu") == (str(works), "", "")
