"""ONNX bundles with weights in 8 and 4 bits, in ONNX Runtime."""

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import ONE, PROFILES, cached_export, few_programs, rewrite, traced_here
from rounding import rounded, unpacked
from safetensors.torch import load_file
from support import CHECKPOINT, relative
from torch import nn

import bagel_opt
from bagel_opt.errors import BundleError, CheckpointError
from bagel_opt.export import export, onnx_graph
from bagel_opt.export.onnx_quantized import Product, as_stored
from bagel_opt.export.quantize import quantize
from bagel_opt.export.verify import verify
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.model.quantized import to_groups

KINDS = ["int8", "int4"]
TABLE = {"gen": "int8", "und": "int4", "vit": "int8", "head": "int8", "embeddings": "int8"}
PROGRAMS = ("text", "decode", "decode_row", "choose", "choose_row")
ROWS, CHANNELS = 48, 168  # of which the last group has 8


class Alone(nn.Module):
    def __init__(self, kind, weight, bias, unpacked):
        super().__init__()
        stored = as_stored(weight, kind, "cpu")
        self.product = Product(kind, [tuple(tensor.shape) for tensor in stored], nn.Linear(CHANNELS, ROWS))
        for name, tensor in zip(("codes", "scale"), stored, strict=True):
            setattr(self.product, name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self.product.unpacked = unpacked
        self.register_buffer("bias", bias)

    def forward(self, x):
        return self.product(x, self.bias)


def products(kind, weight, bias, unpacked):
    """What ONNX Runtime gives for inputs [3, tokens, channels]."""
    x = torch.zeros(3, 5, CHANNELS)
    free = {"x": (None, torch.export.Dim("tokens", min=1, max=1000), None)}
    made = torch.onnx.export(
        Alone(kind, weight, bias, unpacked), (x,), dynamo=True, opset_version=24, dynamic_shapes=free, verbose=False
    )
    session = ort.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture(scope="module", params=[*KINDS, "int4 unpacked"])
def product(request):
    """kind, weight, bias, and what computes with them."""
    kind, _, unpacked = request.param.partition(" ")
    torch.manual_seed(0)
    weight, bias = torch.randn(ROWS, CHANNELS), torch.randn(ROWS)
    weight[0], weight[1] = 1, -1  # all codes of two rows are the largest
    return request.param, weight, bias, products(kind, weight, bias, bool(unpacked))


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_what_the_nodes_compute(product, tokens):
    """Sums that do not fit into 16 bits too."""
    kind, weight, bias, run = product
    x = torch.randn(3, tokens, CHANNELS)
    x[0, 0], x[1, 0], x[2, 0] = 1, -1, 0
    if kind == "int8":
        scale = x.abs().amax(-1, keepdim=True).double() / 63
        codes, by = rounded(weight, "int8")
        x_codes = (x.double() / scale.clamp(min=1e-12)).round().numpy()
        want = torch.from_numpy(x_codes @ codes.T * scale.numpy() * by) + bias.double()
        assert relative(run(x).double(), want) < 2e-3  # one code or two may fall otherwise
        assert relative(run(x)[:, 0].double(), want[:, 0]) < 1e-6 or tokens > 1
    else:
        want = x.double() @ torch.from_numpy(unpacked(*to_groups(weight), CHANNELS)).T + bias.double()
        assert relative(run(x).double(), want) < (0.01 if kind == "int4" else 1e-6)  # the former computed in 8 bits
    full = x.double() @ weight.double().T + bias.double()
    assert relative(run(x).double(), full) < (0.03 if kind == "int8" else 0.12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_own_row(product, value):
    _, _, _, run = product
    x = torch.randn(3, 5, CHANNELS)
    want = run(x)
    x[1, 2, 3] = value
    got = run(x)
    assert not got[1, 2].isfinite().any()
    got[1, 2] = want[1, 2]
    assert torch.equal(got, want)


def test_a_neighbour_a_thousand_times_larger(product):
    _, _, _, run = product
    x = torch.randn(3, 5, CHANNELS)
    want = run(x)
    x[1:] *= 1000
    x[0, 1:] *= 1000
    assert relative(run(x)[0, 0], want[0, 0]) < 1e-6


@pytest.fixture(scope="module")
def bundle():
    return cached_export(CHECKPOINT, PROFILES[CHECKPOINT], name="quantized", quantization=TABLE, programs=PROGRAMS)


def read_text(model, profile=PROFILES[CHECKPOINT]):
    """Hidden states of a text."""
    runtime = model.runtime.for_profile(profile)
    ids, zero = np.arange(5, 5 + profile.text)[None], np.zeros(1, int)
    hidden = runtime.run("text", [ids, zero, zero], runtime.caches(1, profile.slots))[0]
    return torch.tensor(runtime.host(hidden))


def test_it_loads_and_reads(bundle):
    assert read_manifest(bundle).quantization == TABLE
    with few_programs(*PROGRAMS):
        model = bagel_opt.load(bundle)
        assert len(model.run(["what is it?"], output="text", max_think_tokens=6)) == 1
        got = read_text(model)
    want, plain = (read_text(bagel_opt.load(CHECKPOINT, device="cpu", quantization=q)) for q in (TABLE, None))
    assert relative(got, want) < 0.03 < relative(got, plain)


def read_image(model, profile):
    """Hidden states of a ViT's embeddings and of the markers before them, which are rows of the table."""
    runtime, rng = model.runtime.for_profile(profile), np.random.default_rng(0)
    channels, zero = model.config.llm.hidden_size, np.zeros(1, int)
    seen = rng.standard_normal((1, profile.patches, channels), np.float32)
    hidden = runtime.run("vit_context", [seen, zero, zero + 9, zero], runtime.caches(1, profile.slots))[0]
    return torch.tensor(runtime.host(hidden))[:, :11]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_alone_gives_what_the_models_gives(tmp_path, kind):
    """Nothing that is multiplied with is rounded, so to the last bits."""
    with few_programs("text", "vit_context"), traced_here():
        folder = export(CHECKPOINT, tmp_path / "bundle", ONE, quantization={"embeddings": kind})
        bundle = bagel_opt.load(folder)
        got = [read(bundle, ONE) for read in (read_text, read_image)]
    for quantization, near in ({"embeddings": kind}, True), (None, False):
        model = bagel_opt.load(CHECKPOINT, device="cpu", quantization=quantization)
        want = [read(model, ONE) for read in (read_text, read_image)]
        assert all((relative(a, b) < 1e-5) == near for a, b in zip(got, want, strict=True))
    stored = load_file(folder / WEIGHTS)["llm.embed.quantized.codes"]
    assert stored.nbytes == model.runtime.model.llm.embed.weight.nbytes // (4 if kind == "int8" else 8)


def test_of_a_folder_that_was_quantised_before(bundle, tmp_path):
    """The same weights, to the bit."""
    folder = quantize(CHECKPOINT, tmp_path / "quantized", TABLE)
    with few_programs("step"):
        again = export(folder, tmp_path / "bundle", PROFILES[CHECKPOINT])
    got, want = (load_file(made / WEIGHTS) for made in (again, bundle))
    assert got.keys() == want.keys()
    assert all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)
    assert read_manifest(again).quantization == TABLE
    with pytest.raises(CheckpointError, match=r"is quantised, .* cannot change; leave that out"):
        export(folder, tmp_path / "other", PROFILES[CHECKPOINT], quantization="int8")


def test_what_it_says_of_others(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    for wrong, match in (
        (TABLE | {"gen": "fp8"}, r"quantization .* is not for float32 in ONNX Runtime on cpu"),
        (TABLE | {"head": "int4"}, r"mis-shaped|not of their kind"),
        ({}, r"takes weights that its model has not: .*qkv\.quantized\.codes"),
    ):
        rewrite(folder, quantization=wrong)
        with few_programs(*PROGRAMS), pytest.raises(BundleError, match=match):
            bagel_opt.load(folder)


@pytest.mark.second
@pytest.mark.parametrize(
    ("quantization", "least", "most"), [(TABLE, 1e-3, 0.2), ({"embeddings": "int8"}, 0, 1e-4)], ids=["all", "table"]
)
def test_all_its_programs_are_near_the_models(tmp_path, quantization, least, most):
    with traced_here():
        folder = export(CHECKPOINT, tmp_path / "bundle", ONE, quantization=quantization)
    errors = verify(folder, CHECKPOINT)
    assert least < max(errors.values()) < most
    assert np.isfinite(list(errors.values())).all()


@pytest.mark.second
def test_of_a_large_model_codes_are_packed_for_single_tokens_alone(tmp_path, monkeypatch):
    """Otherwise each program would have its copy; and without one MatMulNBits makes floats of all codes for each token."""
    monkeypatch.setattr(onnx_graph, "ALL_PACKED_BELOW", 0)
    programs = {"text": False, "vit_context": False, "decode": True, "generate": False}
    with few_programs(*programs), traced_here():
        folder = export(CHECKPOINT, tmp_path / "bundle", ONE, quantization="int4")
        got = read_text(bagel_opt.load(folder), ONE)
    for program, packed in programs.items():
        entry = read_manifest(folder).programs["one"][program]
        graph = onnx.load(folder / entry["file"], load_external_data=False).graph
        assert packed == ("MatMulNBits" in {node.op_type for node in graph.node})
        codes = {name for name in entry["weights"] if ".quantized." in name}
        assert codes
        assert codes & {value.name for value in graph.input} == (set() if packed else codes)
    want = read_text(bagel_opt.load(CHECKPOINT, device="cpu", quantization="int4"), ONE)
    assert relative(got, want) < 0.1
