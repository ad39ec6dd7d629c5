"""ONNX bundles for CUDA with weights in 8 and 4 bits: their nodes, on the CPU. tests/gpu/ has what needs the GPU."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import ONE, cached_export, few_programs, traced_here
from on_host import in_float32, on_host
from rounding import rounded, unpacked
from safetensors.torch import load_file
from support import CHECKPOINT, relative
from torch import nn

import bagel_opt
from bagel_opt.export import export
from bagel_opt.export.onnx_quantized import GpuProduct, as_stored
from bagel_opt.export.quantize import quantize
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.loading import shipped_model
from bagel_opt.model.quantized import to_groups
from bagel_opt.runtime import onnx_gpu
from bagel_opt.runtime.bundle_check import check_bundle

TABLE = {"gen": "int4", "und": "int8", "vit": "int4", "head": "int8", "embeddings": "int4"}
OTHER = {"gen": "int8", "und": "int4", "vit": "int8", "head": "int4", "embeddings": "int8"}
SEEN, SAID = ("vit", "generate"), ("text", "decode")  # programs
ROWS, CHANNELS = 48, 168  # of which the last block has 40, or 8


class Alone(nn.Module):
    def __init__(self, kind, weight, bias, dtype):
        super().__init__()
        stored = as_stored(weight, kind, "cuda")
        self.product = GpuProduct(kind, [tuple(tensor.shape) for tensor in stored], nn.Linear(CHANNELS, ROWS))
        for name, tensor in zip(("codes", "scale"), stored, strict=True):
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            setattr(self.product, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self.register_buffer("bias", bias.to(dtype))

    def forward(self, x):
        return self.product(x, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_the_nodes_compute(kind, dtype):
    """What comes in is not rounded, and what is not finite shows in its own row."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(ROWS, CHANNELS), torch.randn(ROWS), torch.randn(3, 5, CHANNELS, dtype=dtype)
    made = torch.onnx.export(
        Alone(kind, weight, bias, dtype).eval(), (x,), dynamo=True, opset_version=24, verbose=False
    )
    session = ort.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(x):
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    if kind == "int8":
        codes, scale = rounded(weight, "int8")
        exact = torch.from_numpy(codes * scale[:, None])
    else:
        exact = torch.from_numpy(unpacked(*to_groups(weight), CHANNELS))
    want = x.double() @ exact.T + bias.double()
    assert relative(run(x).double(), want) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert relative(want, x.double() @ weight.double().T + bias.double()) < (0.01 if kind == "int8" else 0.12)
    before = run(x)
    x[1, 2, 3] = float("nan")
    after = run(x)
    assert not after[1, 2].isfinite().any()
    after[1, 2] = before[1, 2]
    assert torch.equal(after, before)


def answers(model, programs):
    """To patches and to a flow step, or to a text and to a token after it."""
    c, p, rng, runtime = model.config, ONE, np.random.default_rng(0), model.runtime.for_profile(ONE)
    caches, one = runtime.caches(1, p.slots), np.ones(1, int)
    latents = rng.standard_normal((1, p.latents, c.latent_dim), np.float32)
    inputs = {
        "vit": [rng.standard_normal((1, p.patches, c.vit.patch_dim), np.float32), np.arange(p.patches)[None], p.patches * one],
        "generate": [latents, np.ones(1, np.float32), np.arange(p.latents)[None], 0 * one, p.latents * one, 0 * one],
        "text": [np.arange(5, 5 + p.text)[None], 0 * one, 0 * one],
        "decode": [9 * one, p.text * one, p.text * one],
    }  # fmt: skip
    ran = [runtime.run(name, inputs[name], () if name == "vit" else caches)[0] for name in programs]
    return [torch.tensor(runtime.host(x)) for x in ran]


def with_weights_alone(quantization):
    """The eager model, of which products take what comes in as it is."""
    model = bagel_opt.load(device="cpu", quantization=quantization)
    for module in model.runtime.model.modules():
        if isinstance(module, nn.Linear) and module.quantized is not None:
            weight = module.quantized.rows(lambda table: table)
            module.quantized, module.weight = None, nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("table", "programs"), [(TABLE, SEEN), pytest.param(OTHER, SAID, marks=pytest.mark.second)], ids=["seen", "said"]
)
def test_a_bundle_gives_what_its_weights_stand_for(table, programs):
    """In float32, to the last bits. Of each part the weights are in fewer bits, so another kind gives other answers."""
    with in_float32():
        folder = cached_export(
            shipped_model(), ONE, name="quantized-gpu", device="cuda", quantization=table, programs=programs
        )
    got = answers(on_host(folder), programs)
    want, plain = (answers(model, programs) for model in (with_weights_alone(table), bagel_opt.load(device="cpu")))
    assert all(relative(a, b) < 2e-5 for a, b in zip(got, want, strict=True))
    assert all(relative(a, b) > 1e-3 for a, b in zip(got, plain, strict=True))
    kinds = {node.op_type for path in folder.glob("*.onnx") for node in onnx.load(path).graph.node}
    assert "MatMulNBits" in kinds
    assert not kinds & {"BitShift", "BitwiseAnd", "MatMulInteger", "DynamicQuantizeLinear"}  # CUDA has none of them


def test_a_bundle_in_16_bits(tmp_path):
    """It holds the codes that a folder had which was quantised before, and scales in its own precision."""
    folder, dtype = quantize(None, tmp_path / "quantized", TABLE), {"device": "cuda", "dtype": "bfloat16"}
    with few_programs("step"), traced_here():
        bundles = [
            export(source, tmp_path / name, ONE, **dtype, **more)
            for source, name, more in ((None, "from floats", {"quantization": TABLE}), (folder, "from codes", {}))
        ]
        for made in bundles:
            manifest = read_manifest(made)
            check_bundle(made, manifest)
            assert manifest.quantization == TABLE
    a, b = (load_file(made / WEIGHTS) for made in bundles)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in {**a, **b})
    assert {t.dtype for n, t in a.items() if ".und." in n and n.endswith(".codes")} == {torch.uint8}
    assert {t.dtype for n, t in a.items() if ".und." in n and n.endswith(".scale")} == {torch.bfloat16}
    assert a["llm.norm_und.weight"].dtype == torch.bfloat16


def test_what_it_says_of_others(tmp_path):
    for more in ({"dtype": "bfloat16", "quantization": "fp8"}, {"dtype": "float32", "quantization": "int8"}):
        with pytest.raises(ValueError, match=r"ONNX bundles take .* for CUDA in float16 and bfloat16"):
            export(CHECKPOINT, tmp_path / "bundle", ONE, device="cuda", **more)
    folder = quantize(CHECKPOINT, tmp_path / "quantized", "int4")
    with pytest.raises(ValueError, match=r"in groups of 32 channels, of which its heads of 16 are no multiple"):
        export(folder, tmp_path / "bundle", ONE, device="cuda", dtype="bfloat16")
    with few_programs("step"), traced_here():  # for the CPU they stay in their order
        made = export(folder, tmp_path / "bundle", ONE, dtype="float32")
    assert set(read_manifest(made).quantization.values()) == {"int4"}


def test_no_kernel_is_asked_for_that_takes_constant_weights(monkeypatch):
    """As the environment could."""
    monkeypatch.setattr(onnx_gpu, "load_session", lambda path, options, providers: options)
    with in_float32():
        folder = cached_export(CHECKPOINT, ONE, name="step-gpu", device="cuda", programs=["step"])
    runtime = on_host(folder).runtime
    options = onnx_gpu.OnnxGpuRuntime._load(runtime, folder / "decode.onnx", {})
    assert options.get_session_config_entry("ep.cuda.fpa_intb_gemm") == "0"
