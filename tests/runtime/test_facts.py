"""What a machine's facts say, of this one and of others that are made up."""

import json
import sys
from types import SimpleNamespace

import onnxruntime
import PIL
import pytest
import torch
from broken import packages

from bagel_opt import installed
from bagel_opt.runtime import facts as module
from bagel_opt.runtime.facts import facts, faster

CUDA = torch.device("cuda", 0)


def unused(found):
    return {one["what"]: (one["why"], one["do"]) for one in found["unused"]}


@pytest.fixture
def absent(monkeypatch):
    """Makes libraries absent."""

    def make(*names):
        installed.fault.cache_clear()
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    yield make
    installed.fault.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch find two GPUs of a kind, as far as the facts ask."""

    def make(major, minor):
        about = SimpleNamespace(name="Some GPU", major=major, minor=minor, total_memory=8 * 10**10)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    return make


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A driver that tells of a GPU."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 9.0, 81559"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_this_machine():
    found = json.loads(json.dumps(facts()))
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "onnxruntime", "triton", "flash-attn-4", "quack-kernels", "pillow"} < found["versions"].keys()
    cpu = found["devices"][0]
    assert cpu["features"].startswith(torch.backends.cpu.get_cpu_capability())
    assert cpu["uses"]["attention, float32"] == "sdpa"
    assert cpu["uses"]["ONNX bundles"].startswith("onnxruntime ")
    assert all(one["what"] and one["why"] for one in found["unused"])


def test_without_torch_and_onnxruntime(absent):
    absent("torch", "onnxruntime")
    found = facts()
    assert found["devices"][0]["uses"] == {}
    assert unused(found) == {
        "checkpoints, and bundles of aoti, export and compile": (
            "torch is not installed",
            "pip install 'bagel-opt[torch]'",
        ),
        "ONNX bundles": ("onnxruntime is not installed", "pip install 'bagel-opt[onnx]'"),
    }


def test_libraries_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.27.0")
    found = unused(facts())
    why, do = found["checkpoints, and bundles of aoti, export and compile"]
    assert (why, do) == ("torch 2.10.0+cpu is older than 2.11", "pip install --upgrade 'bagel-opt[torch]'")
    assert found["ONNX bundles"][0] == "onnxruntime 1.27.0 is older than 1.28"


def test_versions_that_are_not_asked_for(monkeypatch):
    """As pip tells of them. Of those that loading refuses or warns of, the libraries themselves are asked."""
    there = {
        "numpy": "1.25.2",
        "tokenizers": "0.20.0",
        "uvicorn": "0.100",
        "torch": "1.0",
        "pillow": "12.3.0",
        "pytest": "7.4",
    }
    there |= {"quack-kernels": "0.7.0", "flash-attn-4": "4.0.0b37", "nvidia-cutlass-dsl": "4.8.0"}
    monkeypatch.setattr(installed, "version", there.get)
    told = unused(facts())
    assert {what: do for what, (why, do) in told.items() if why.endswith(" is installed")} == {
        bounds: f"pip install '{bounds}'"
        for bounds in ("numpy>=1.26", "quack-kernels<0.7,>=0.6.5", "nvidia-cutlass-dsl<4.9,>=4.8.1")
    }
    assert told["numpy>=1.26"][0] == "numpy 1.25.2 is installed"
    assert "pillow>=13" not in told
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    why, do = unused(facts())["pillow>=13"]
    assert why.startswith("pillow 12.3.0 resizes some pictures")
    assert do == "pip install 'pillow>=13'"


def test_a_hopper_gpu_on_which_all_is_missing(gpu, absent, tmp_path, monkeypatch):
    gpu(9, 0)
    absent("triton", "quack", "cuda")
    with packages(monkeypatch, tmp_path):
        found = facts()
        assert faster(CUDA, "flash", asked=True) == [
            "flash-attn-4 is not installed, so attention is torch's FlashAttention 2; pip install 'bagel-opt[flash]'"
        ]
        assert faster(CUDA, "sdpa", asked=True) == []
    assert [device["device"] for device in found["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    about = found["devices"][1]
    assert (about["model"], about["capability"], about["memory_bytes"]) == ("Some GPU", "9.0", 8 * 10**10)
    assert about["uses"] == {
        "attention, float32": "sdpa",
        "attention, bfloat16": "torch's FlashAttention 2",
        "attention, float16": "torch's FlashAttention 2",
        "fused products": "none",
        "torch.compile": "none",
        "quantization": "fp8, int8, int4: by torch's own products, slowly",
    }
    told = unused(found)
    assert told["FlashAttention"][1] == told["fused products"][1] == "pip install 'bagel-opt[flash]'"
    assert told["torch.compile and quantised products on the GPU"] == ("Triton is not installed", "pip install triton")
    why, do = told["ONNX bundles on the GPU"]
    assert why == f"onnxruntime {onnxruntime.__version__} is built without CUDA"
    assert do == "pip uninstall onnxruntime; pip install 'bagel-opt[onnx-gpu]'"
    assert len(found["unused"]) == len(told) == 4 + bool(installed.compiler("cpu").why)  # a kind of GPU is told of once


def test_a_hopper_gpu_on_which_all_is_there(gpu, tmp_path, monkeypatch):
    gpu(9, 0)
    works = "def flash_attn_varlen_func(*_, **__): ..."
    monkeypatch.setattr("bagel_opt.runtime.fused_products.fault", lambda *_: None)
    monkeypatch.setattr("bagel_opt.runtime.fused_products.fault_fp8", lambda *_: None)
    monkeypatch.setattr(module, "_why_no_cuda_provider", lambda: None)
    with packages(monkeypatch, tmp_path, flash_attn__cute=works, triton=""):
        found = facts()
        assert faster(CUDA, "flash", asked=True) == []
    uses = found["devices"][1]["uses"]
    assert uses["attention, bfloat16"] == "flash-attn-4"
    assert uses["fused products"] == "quack-kernels"
    assert uses["torch.compile"] == "triton"
    assert uses["quantization"] == "fp8, int8, int4: by kernels in Triton"
    assert uses["ONNX bundles"].endswith("CUDAExecutionProvider")
    assert {one["what"] for one in found["unused"]} <= {"torch.compile on the CPU"}


def test_a_broken_flash_attention_is_told_of_and_no_note_says_it_again(gpu, tmp_path, monkeypatch):
    gpu(9, 0)
    with packages(monkeypatch, tmp_path, flash_attn__cute="raise ImportError('undefined symbol')"):
        assert unused(facts())["FlashAttention"] == (
            "flash-attn-4 cannot be imported (undefined symbol), so attention is torch's FlashAttention 2",
            "pip install 'bagel-opt[flash]' installs what was tried together",
        )
        assert faster(CUDA, "flash", asked=True) == []


def test_an_old_gpu(gpu, tmp_path, monkeypatch):
    gpu(7, 5)
    with packages(monkeypatch, tmp_path):
        told = unused(facts())
    assert told["FlashAttention"] == ("it needs compute capability 8.0, and Some GPU has less", "")
    assert told["fused products"] == ("quack-kernels: they are for Hopper GPUs, in bfloat16 and float16", "")
    assert {f"quantization {kind}" for kind in ("fp8", "int8", "int4")} < told.keys()


def test_a_gpu_that_torch_does_not_see(smi, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = facts()
    why, do = unused(found)["NVIDIA H100 80GB HBM3"]
    assert why == f"torch {torch.__version__} is built without CUDA and does not see the NVIDIA H100 80GB HBM3"
    assert do.startswith("pip uninstall torch; pip install 'bagel-opt[torch]'")
    assert found["devices"][1]["memory_bytes"] == 81559 * 2**20
    [line] = faster(cpu, "sdpa", asked=False)
    assert line == f"{why}; {do}"
    assert faster(cpu, "sdpa", asked=True) == []  # "cpu" was asked for

    def fails():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails)
    assert (
        "(The NVIDIA driver on your system is too old (found version 11040))"
        in unused(facts())["NVIDIA H100 80GB HBM3"][0]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused(facts())["NVIDIA H100 80GB HBM3"] == (
        "CUDA_VISIBLE_DEVICES='' hides it",
        "unset CUDA_VISIBLE_DEVICES",
    )
    assert faster(cpu, "sdpa", asked=False) == []


def test_a_driver_that_fails(smi, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert [device["device"] for device in facts()["devices"]] == ["cpu"]
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\n")
    assert [device["device"] for device in facts()["devices"]] == ["cpu"]


def test_two_onnxruntimes_at_once(monkeypatch):
    monkeypatch.setattr(module, "version", lambda _: "1.31.0")
    why, do = unused(facts())["one of them"]
    assert "both installed" in why
    assert do.startswith("pip uninstall onnxruntime onnxruntime-gpu; pip install 'bagel-opt[onnx")


def test_the_onnx_model_that_tries_a_provider(tmp_path):
    from bagel_opt.runtime.onnx import load_session

    (tmp_path / "a.onnx").write_bytes(module.IDENTITY)
    session = load_session(tmp_path / "a.onnx", onnxruntime.SessionOptions(), ["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "x"
