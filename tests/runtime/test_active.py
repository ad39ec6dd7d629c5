"""What each runtime says of itself."""

import dataclasses
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from broken import packages
from support import CHECKPOINT

import bagel_opt
from bagel_opt.runtime import active
from bagel_opt.runtime.active import torch_active
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare

TORCH = {"runtime": f"torch {torch.__version__}", "device": "cpu", "dtype": "float32", "attention": "sdpa"}
NONE = {"fused_products": "none", "compiler": "none", "quantization": "none"}


def test_eager_and_compiled(eager, monkeypatch):
    assert eager.runtime.active() == {**TORCH, "backend": "eager", **NONE}
    monkeypatch.setattr(active, "compiled_by", lambda device: f"one for {device}")
    prepared = dataclasses.replace(prepare(eager.runtime.model), compiled=True)
    told = TorchRuntime(prepared).active()
    assert told == {**TORCH, "backend": "compile", **NONE, "compiler": "one for cpu"}


def test_quantised():
    model = bagel_opt.load(CHECKPOINT, device="cpu", quantization={"gen": "int8", "head": "int4"})
    assert model.runtime.active() == {**TORCH, "backend": "eager", **NONE, "quantization": "gen=int8,head=int4"}


def test_a_bundle_of_torch(two):
    assert bagel_opt.load(two, check=False).runtime.active() == {**TORCH, "backend": "export", **NONE}


def test_a_bundle_of_onnx(bundle):
    told = bagel_opt.load(bundle, check=False).runtime.active()
    assert told.pop("device").startswith("cpu, ")
    assert told == {
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider",
        "backend": "onnx",
        "dtype": "float32",
        "attention": "onnx",
        **NONE,
    }


@pytest.mark.parametrize(
    ("backend", "attention", "kinds", "fused"),
    [
        ("compile", "flash", {}, "quack-kernels"),
        ("compile", "flash", {"gen": "int8"}, "quack-kernels (not in int8)"),
        ("compile", "flash", {"gen": "int8", "und": "int8"}, "none"),
        ("compile", "sdpa", {}, "none"),
        ("eager", "flash", {}, "none"),
        ("aoti", "flash", {}, "none"),
    ],
)
def test_a_gpu(backend, attention, kinds, fused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr("bagel_opt.runtime.fused_products.fault", lambda *_: None)
    with packages(monkeypatch, tmp_path, triton="", flash_attn__cute="def flash_attn_varlen_func(*_, **__): ..."):
        told = torch_active(backend, torch.device("cuda", 1), torch.bfloat16, attention, kinds)
    assert told["device"] == "cuda:1 Some GPU"
    assert told["attention"] == {"flash": "flash-attn-4", "sdpa": "sdpa"}[attention]
    assert told["fused_products"] == fused
    assert told["compiler"] == ("triton" if backend == "compile" else "none")


def test_a_gpu_in_onnx_runtime(bundle):
    from bagel_opt.runtime.onnx_gpu import OnnxGpuRuntime

    runtime = object.__new__(OnnxGpuRuntime)
    runtime.memory = SimpleNamespace(name="cuda", device=1)
    runtime.manifest = bagel_opt.files.manifest.read_manifest(bundle)
    told = runtime.active()
    assert (told["device"], told["runtime"].split(", ")[1]) == ("cuda:1", "CUDAExecutionProvider")
