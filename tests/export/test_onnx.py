"""Programs as ONNX graphs: what is in them, and which program serves whom."""

import contextlib
import io
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import few_programs, traced_here
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt import Profile
from bagel_opt.cli.commands import main
from bagel_opt.export import export, onnx_graph
from bagel_opt.export.onnx_free_sizes import free_sizes, rows_to_trace
from bagel_opt.export.verify import verify
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights
from bagel_opt.programs.signatures import ONE_ROW, ROW

PROFILE = Profile("test", 2, 600, 64, 64, 64)
CACHED = ("text", "vit_context", "decode", "generate")
named = {case.name: case for case in cases()}


def graph(folder, program):
    return onnx.load(folder / f"{program}.onnx", load_external_data=False).graph


@pytest.mark.parametrize("program", CACHED)
def test_transformer_graphs_are_static_and_plain(bundle, eager, program):
    c = eager.config.llm
    nodes = graph(bundle, program).node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["Attention"] == c.num_hidden_layers
    assert kinds["TensorScatter"] == 2 * c.num_hidden_layers
    for forbidden in ("Loop", "Scan", "If", "Shape", "Size", "NonZero", "Tile", "Range", "Transpose"):
        assert forbidden not in kinds
    for node in nodes:
        if node.op_type == "Attention":
            attributes = {a.name: a.i for a in node.attribute}
            assert attributes["q_num_heads"] == c.num_attention_heads
            assert attributes["kv_num_heads"] == c.num_key_value_heads
            assert attributes["is_causal"] == (program in ("text", "decode"))
            assert node.input[6]  # nonpad_kv_seqlen
    for value in (*graph(bundle, program).input, *graph(bundle, program).output):
        sides = value.type.tensor_type.shape.dim
        free = {"rows"} if program in ONE_ROW else set()
        if len(sides) == 4:  # a cache
            free.add("slots")
        assert {side.dim_param for side in sides if not side.HasField("dim_value")} == free, value.name


def test_opset_is_24_and_graphs_are_valid(bundle):
    for path in bundle.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]


def test_each_weight_is_there_once(bundle, eager):
    """All weights in one file, in no graph. Graphs do not grow with the width of the model."""
    places = locate_weights(bundle / WEIGHTS)
    weights = sum(place.length for place in places.values())
    assert weights == sum(p.nbytes for p in eager.runtime.model.parameters())
    used = set()
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                assert entry["location"] == WEIGHTS
                assert int(entry["offset"]) == places[tensor.name].offset
                assert int(entry["length"]) == places[tensor.name].length
                used.add(tensor.name)
            else:
                assert tensor.ByteSize() < 2000, (path.name, tensor.name)
    assert used == set(places)
    assert sum(path.stat().st_size for path in bundle.iterdir()) < weights + 400_000


@pytest.mark.second
def test_one_program_serves_all_rows_and_profiles(half):
    """ONNX Runtime would prepare the weights for each one anew."""
    small, large = read_manifest(half).programs.values()
    for name in ONE_ROW:
        files = {entry["file"] for programs in (small, large) for entry in (programs[name], programs[name + ROW])}
        assert files == {f"{name}.onnx"}
    assert small["text"]["file"] == large["text"]["file"]
    assert small["step"]["file"] != large["step"]["file"]
    assert large["generate"]["inputs"]["x"][0][0] == 3  # what the profile has


@pytest.mark.second
def test_of_a_large_model_what_one_program_needs_is_packed(tmp_path, monkeypatch):
    """All other weights may be given anew in each run, so that ONNX Runtime does not prepare copies of them."""
    monkeypatch.setattr(onnx_graph, "ALL_PACKED_BELOW", 0)
    with traced_here(), few_programs(*CACHED, *(name + ROW for name in ONE_ROW), "vae_decode", "choose", "step"):
        folder = export(CHECKPOINT, tmp_path / "bundle", PROFILE)
        model = bagel_opt.load(folder)
    users = Counter()
    for program in (*CACHED, "vae_decode"):
        entry, there = read_manifest(folder).programs["test"][program], graph(folder, program)
        fixed = set(entry["weights"]) - {value.name for value in there.input}
        assert {tensor.name for tensor in there.initializer} >= set(entry["weights"])
        users.update(fixed)
        if program in ("text", "vit_context", "decode"):
            assert not fixed
        elif program == "generate":
            assert fixed == {name for name in entry["weights"] if ".gen." in name or name.startswith("time.")}
        else:
            assert fixed == set(entry["weights"])
    assert set(users.values()) == {1}
    case, events = named["text_to_image"], []
    case.check_outputs(model.run(case.inputs, on_step=events.append, **case.options))
    assert case.velocity_error(events) < 1e-4


def test_rows_are_told_apart_from_all_other_sizes():
    profile = Profile("p", rows=2, slots=2 * 1009, text=16, patches=1013 - 2, latents=1019)
    assert rows_to_trace([PROFILE, profile], [(64, 1015), (3,)]) == 1017


def test_a_constant_of_each_row_is_refused():
    """None of our programs has one; one that did would be wrong for all numbers of rows but that it was traced with."""
    x, y = (ir.Value(name=n, shape=ir.Shape([1009, 4]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    each = ir.tensor(np.ones((1009, 1), np.float32), name="each")
    constant = ir.Value(name="each", shape=each.shape, const_value=each)
    node = ir.node("Mul", [x, constant], outputs=[y])
    made = ir.Graph([x], [y], nodes=[node], initializers=[constant], name="decode")
    with pytest.raises(ValueError, match="program 'decode' holds each for 1009 rows"):
        free_sizes(made, 1009, [])


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A bundle of two profiles in float16, by the documented command, run in this process."""
    folder = tmp_path_factory.mktemp("half")
    profile = folder / "profile.toml"
    profile.write_text('name = "two"\nrows = 2\nslots = 600\ntext = 64\npatches = 64\nlatents = 64\n')
    command = ["export", "--checkpoint", CHECKPOINT, "--format", "onnx", "--dtype", "float16"]
    command += ["--profile", profile, "--profile", "tiny", "--out", folder / "out"]
    with traced_here(), contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(list(map(str, command))) == 0
    assert said.getvalue().strip() == str(folder / "out")
    return folder / "out"


@pytest.mark.second
def test_half_precision_by_the_command_line(half, capsys):
    out, case, events = half, named["image_editing"], []
    bagel_opt.load(out).run(case.inputs, on_step=events.append, **case.options)
    assert case.velocity_error(events) < 2e-2
    errors = verify(out, CHECKPOINT)
    assert 1e-5 < errors["generate"] < 2e-2
    assert "answering" not in errors  # another token may be likeliest
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("float16", "vit_context", "onnxruntime", "slots"):
        assert text in shown
