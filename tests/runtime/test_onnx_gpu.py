"""ONNX for CUDA: its graphs, and its runtime over the host's memory, so that all but CUDA itself is tested everywhere.
tests/gpu/ has what needs the GPU."""

import numpy as np
import onnx
import onnxruntime as ort
import onnxscript.optimizer
import pytest
import torch
from bundles import ONE, PROFILES, cached_export
from on_host import HostMemory, OnHost, in_float32, on_host
from support import CHECKPOINT, cases, relative

import bagel_opt
from bagel_opt import Profile
from bagel_opt.export import onnx as exporter
from bagel_opt.export import onnx_graph
from bagel_opt.export.examples import example_inputs
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights, mapped_weights
from bagel_opt.programs.callables import programs
from bagel_opt.programs.exercise import run_programs
from bagel_opt.programs.signatures import signatures
from bagel_opt.runtime.gpu_memory import DeviceTensor
from bagel_opt.runtime.onnx import load_session
from bagel_opt.runtime.onnx_gpu import GRAPHED

PROFILE = PROFILES[CHECKPOINT]
LAYER = {  # nodes of one layer of the flow step: of each of two experts, but for what joins them
    "plain": "8 RMSNormalization, 12 Gemm, 4 RotaryEmbedding, 1 Attention, 2 TensorScatter, 3 Concat, 2 Split, 2 Sigmoid, "
    "4 Mul, 4 Add, 2 Slice",
    "fused": "4 RMSNormalization, 4 SkipSimplifiedLayerNormalization, 12 Gemm, 4 RotaryEmbedding, 1 MultiHeadAttention, "
    "2 TensorScatter, 3 Concat, 2 Split, 2 GatedRMSNorm, 2 Slice",
}
FREE = {"Reshape", "Cast", "Unsqueeze", "Squeeze", "Gather", "Expand", "Cos", "Sin"}  # of shapes, or once a program


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.second), "fused"])
def bundle(request):
    """In float32, with and without the operators that are for 16 bits, which run on the CPU as well."""
    with in_float32(request.param == "fused"):
        return cached_export(CHECKPOINT, PROFILE, name=request.param, device="cuda")


@pytest.fixture(scope="module")
def model(bundle):
    return on_host(bundle)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_answers(model, case):
    for _ in range(2):  # the second time with the memory of the first
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        assert case.velocity_error(events) < 1e-4
        case.check_outputs(outputs)


def test_teacache(model, eager, monkeypatch):
    names, run = [], model.runtime.run
    monkeypatch.setattr(model.runtime, "run", lambda name, *rest: names.append(name) or run(name, *rest))
    seen, options = ([], []), {"num_timesteps": 20, "height": 64, "width": 48, "seed": 3, "step_cache": "teacache"}
    for runner, events in zip((model, eager), seen, strict=True):
        runner.run("a red circle", on_step=events.append, **options)
    assert all(relative(a.v_t, b.v_t) < 1e-4 for a, b in zip(*seen, strict=True))
    assert names.count("tea_apply") == 19
    assert sum(name.startswith("generate") for name in names) < 19


def test_memory_goes_back(model):
    runtime, case = model.runtime, cases()[0]
    model.run(case.inputs, **case.options)
    before = len(runtime.memory.held), len(runtime.bound)
    for _ in range(3):
        model.run(case.inputs, **case.options)
    assert (len(runtime.memory.held), len(runtime.bound)) == before
    kept = runtime.caches(1, 64)  # of another size, such as another profile's
    assert [cache.shape[:2] for cache in kept] == [(1, 64)] * len(runtime.cache_names)
    assert not any(np.any(runtime.host(cache)) for cache in kept)
    assert (len(runtime.returned), len(runtime.bound)) == (1, before[1])


def test_caches_that_are_kept_make_room_where_memory_is_full(model):
    runtime, case = model.runtime, cases()[0]
    model.run(case.inputs, **case.options)
    before = len(runtime.bound)
    runtime.memory.left = sum(cache.nbytes for cache in runtime.returned[0])
    try:
        larger = runtime.caches(6, 768)
        assert [cache.shape[:2] for cache in larger] == [(6, 768)] * len(runtime.cache_names)
        assert runtime.returned == []
        assert len(runtime.bound) < before
        with pytest.raises(MemoryError):
            runtime.caches(6, 768)
    finally:
        runtime.memory.left = None
    del larger
    model.run(case.inputs, **case.options)


@pytest.mark.second
def test_alternating_profiles_bind_each_program_once():
    """On a GPU a program that is bound anew is captured anew, too."""
    profiles = [Profile("small", 1, 256, 16, 16, 16), Profile("large", 1, 320, 16, 16, 36)]
    programs = ("text", "generate", "step", "vae_decode")
    folder = cached_export(CHECKPOINT, profiles, name="two", device="cuda", programs=programs)
    model, bound = on_host(folder), []
    original = OnHost._bind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OnHost, "_bind", lambda self, program, *rest: bound.append(program) or original(self, program, *rest)
        )
        counts = []
        for side in (64, 96, 64, 96, 64):
            model.generate("a", height=side, width=side, num_timesteps=3, seed=1, cfg_text_scale=1.0)
            counts.append(len(bound))
    assert counts[0] < counts[1] == counts[-1]


def test_weights_are_inputs_and_there_once(bundle, eager):
    manifest = read_manifest(bundle)
    places, used = locate_weights(bundle / WEIGHTS), set()
    assert sum(at.length for at in places.values()) == sum(p.nbytes for p in eager.runtime.model.parameters())
    for entry in manifest.programs["tiny"].values():
        graph = onnx.load(bundle / entry["file"]).graph
        assert {value.name for value in graph.input if value.name in places} == set(entry["weights"])
        assert sum(tensor.ByteSize() for tensor in graph.initializer) < 5000
        used.update(entry["weights"])
    assert used == set(places)


@pytest.fixture(scope="module")
def shapes():
    return exporter.Shapes(Checkpoint(CHECKPOINT).config, torch.float16, "cuda")


@pytest.mark.parametrize(
    "name", ["vit", "taylor_predict", *(pytest.param(n, marks=pytest.mark.second) for n in ("generate", "vae_decode"))]
)
def test_few_rules_leave_what_all_rules_would(name, shapes, monkeypatch):
    found = []

    def optimize(program):
        theirs = program.clone()
        found.append(nodes(program))
        onnx_graph.optimize(program)
        onnxscript.optimizer.optimize(theirs)
        found.extend((nodes(program), nodes(theirs)))

    def nodes(program):
        return [(node.op_type, len(node.inputs), [x.name for x in node.outputs]) for node in program.graph]

    monkeypatch.setattr(exporter, "optimize", optimize)
    signature = signatures(shapes.config, PROFILE)[name]
    exporter.export_program(shapes, name, programs(shapes.model)[name], signature, PROFILE)
    before, ours, theirs = found
    assert ours == theirs
    assert len(before) > len(ours) + 5


def test_a_program_is_traced_with_its_own_parameters_alone(shapes):
    before = {name: id(p) for name, p in shapes.model.named_parameters()}
    with shapes.fake:
        inputs, caches, _ = example_inputs(
            shapes.config, signatures(shapes.config, PROFILE)["text"], PROFILE, torch.float16, torch.device("cpu")
        )
    with (
        torch.no_grad(),
        exporter.only_used_parameters(shapes.model, shapes.fake, programs(shapes.model)["text"], (*inputs, *caches)),
    ):
        during = dict(shapes.model.named_parameters())
    assert "llm.layers.0.und.down.weight" in during
    assert all(name.startswith("llm.") and ".gen." not in name for name in during)
    assert {name: id(p) for name, p in shapes.model.named_parameters()} == before


def test_a_layer_is_few_nodes(bundle):
    """Norms, rotations and attention are single nodes, and no large product's output is cut."""
    graph = onnx.load(bundle / "generate.onnx").graph
    layers = read_manifest(bundle).config.llm.num_hidden_layers
    found = [node.op_type for node in graph.node]
    wanted = {kind: int(count) for count, kind in (entry.split() for entry in LAYER[bundle.name].split(", "))}
    for kind, count in wanted.items():
        # the last layer leaves the markers' tokens; before and after the layers there are a few more
        assert (layers - 1) * count <= found.count(kind) <= layers * count + 8, kind
    assert set(found) - set(wanted) <= FREE | {"Add", "Mul", "Sigmoid"}


@pytest.mark.parametrize("program", GRAPHED)
def test_nothing_in_a_replayed_graph_reads_host_memory(bundle, tmp_path, program):
    """As CUDA's kernel of an uneven Split does. Checked on what ONNX Runtime makes of the program."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    load_session(bundle / f"{program}.onnx", options, ["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    splits = [node for node in graph.node if node.op_type == "Split"]
    assert splits
    assert not [node.name for node in splits if len(node.input) > 1 and len(set(sizes[node.input[1]].tolist())) > 1]


@pytest.mark.second
def test_bfloat16_graphs_hold_no_other_precision_inside():
    """Only what goes in and out, and the angles, is float32."""
    folder = cached_export(CHECKPOINT, ONE, device="cuda", dtype="bfloat16", programs=["generate"])
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / "generate.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    products = [node.output[0] for node in graph.node if node.op_type in ("Gemm", "Attention", "RMSNormalization")]
    assert {kinds.get(name, onnx.TensorProto.BFLOAT16) for name in products} == {onnx.TensorProto.BFLOAT16}
    stored = {name: array.view("uint16") for name, _, array in mapped_weights(folder / WEIGHTS)}
    assert {at.dtype.name for at in locate_weights(folder / WEIGHTS).values()} == {"bfloat16"}
    layer = bagel_opt.load(CHECKPOINT, device="cpu").runtime.model.llm.layers[1].gen
    halves = [torch.from_numpy(stored[f"llm.layers.1.gen.gate_up.{half}.weight"].copy()) for half in ("gate", "up")]
    assert torch.equal(torch.cat(halves).view(torch.bfloat16), layer.gate_up.weight.bfloat16())


def test_rows_of_a_tensor_and_16_bit_floats():
    memory = HostMemory()
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4) / 7
    tensor = memory.from_numpy(values, "bfloat16")
    assert tensor.nbytes == 48
    assert np.abs(memory.numpy(tensor) - values).max() < 0.01
    assert np.array_equal(memory.numpy(tensor[1]), memory.numpy(tensor)[1])
    assert np.array_equal(memory.numpy(tensor[1:3]), memory.numpy(tensor)[1:])
    memory.upload(np.zeros((1, 4), np.float32), tensor[2])
    assert not memory.numpy(tensor)[2, 0].any()
    assert memory.numpy(tensor)[2, 1].all()
    with pytest.raises(ValueError, match="do not fit"):
        memory.upload(values, tensor[0])
    assert isinstance(tensor[0], DeviceTensor)
    del tensor
    assert memory.held == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_cuda_it_says_what_is_missing(bundle):
    with pytest.raises(ImportError, match=r"built without CUDA.*pip install 'bagel-opt\[onnx-gpu\]'"):
        bagel_opt.load(bundle)
    with pytest.raises(ValueError, match=r"allowed for .* is 'cuda'"):
        bagel_opt.load(bundle, device="cpu")


def test_programs_agree_with_eager(model, eager):
    config, profile = model.config, PROFILE
    pairs = zip(run_programs(eager.runtime, config, profile), run_programs(model.runtime, config, profile), strict=True)
    for (name, want), (_, got) in pairs:
        for a, b in zip(want, got, strict=True):
            allowed = (
                1 if a.dtype == np.uint8 else 2e-4 * max(1.0, np.abs(a).max())
            )  # bytes may be rounded the other way
            assert np.abs(a.astype(np.float64) - b).max() <= allowed, name
