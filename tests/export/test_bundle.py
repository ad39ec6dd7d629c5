"""Bundles: what an export writes, what loading one refuses."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import rewrite
from PIL import Image
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt import BundleError, Profile, ProfileError
from bagel_opt.cli.commands import main
from bagel_opt.export import export, onnx_graph, processes
from bagel_opt.export import onnx as exporter
from bagel_opt.export.bundle import _replaceable
from bagel_opt.export.onnx_free_sizes import free_sizes, rows_to_trace
from bagel_opt.export.verify import verify
from bagel_opt.files.manifest import FORMAT, MANIFEST, WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights
from bagel_opt.programs.signatures import ONE_ROW, ROW
from bagel_opt.runtime.onnx import OnnxRuntime

PROFILE = Profile("test", 2, 600, 64, 64, 64)
CACHED = ("text", "vit_context", "decode", "generate")
named = {case.name: case for case in cases()}


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def graph(folder, program):
    return onnx.load(folder / f"{program}.onnx", load_external_data=False).graph


# ---- what is in it


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


def test_manifest_tells_what_is_there(bundle):
    manifest = read_manifest(bundle)
    assert manifest.kind == "onnx"
    assert manifest.dtype == "float32"
    assert [profile.name for profile in manifest.profiles] == ["tiny"]
    assert set(manifest.files) == {path.name for path in bundle.iterdir()} - {MANIFEST}
    assert manifest.programs["tiny"]["generate"]["inputs"]["x"] == [[3, 64, 64], "float32"]
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in manifest.files.values())


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
    monkeypatch.setattr(exporter, "in_processes", lambda _, model, tasks: exporter.write_programs(model, tasks))
    folder = export(CHECKPOINT, tmp_path / "bundle", PROFILE)
    users = Counter()
    for program in (*CACHED, "vit", "vae_encode", "vae_decode"):
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
    case, events = named["image_editing"], []
    case.check_outputs(bagel_opt.load(folder).run(case.inputs, on_step=events.append, **case.options))
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


# ---- what is refused


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "tokenizer.json", "generate.onnx", "vae_decode.onnx"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_one_changed_byte_is_refused(copy, name, place):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=re.escape(str(path))):
        bagel_opt.load(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "text.onnx", "tokenizer.json"])
def test_a_missing_or_truncated_file_is_refused(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=re.escape(str(path))):
        bagel_opt.load(copy)
    path.unlink()
    with pytest.raises(BundleError, match=f"{re.escape(str(path))} is missing"):
        bagel_opt.load(copy)


def test_a_newer_format_is_refused(copy):
    for version, advice in ((FORMAT + 1, "upgrade it"), (FORMAT - 1, "export the bundle again"), ("x", "export")):
        rewrite(copy, format=version)
        with pytest.raises(BundleError, match=f"bundle format {version}; this bagel_opt reads {FORMAT}, so {advice}"):
            bagel_opt.load(copy)


def test_files_outside_the_bundle_are_refused(copy):
    files = json.loads((copy / MANIFEST).read_text())["files"]
    rewrite(copy, files={**files, "../secret": {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="outside"):
        bagel_opt.load(copy)
    (copy / "secret").symlink_to("/etc/hostname")
    rewrite(copy, files={**files, "secret": {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="outside"):
        bagel_opt.load(copy)
    rewrite(copy, files={name: entry for name, entry in files.items() if name != "text.onnx"})
    with pytest.raises(BundleError, match=r"no sha256 of text\.onnx"):
        bagel_opt.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pickle"}, "data.kind must be one of"),
        ({"profiles": []}, "data.profiles must contain at least 1 items"),
        ({"profiles": [{"name": "x", "rows": 0}]}, "data.profiles"),
        ({"extra": 1}, "data must not contain"),
        ({"programs": {"tiny": {"text": {"inputs": {}}}}}, "data.programs.tiny.text must contain"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(copy, change, message):
    rewrite(copy, **change)
    with pytest.raises(BundleError, match=message):
        bagel_opt.load(copy)


def test_digests_can_be_skipped_but_sizes_cannot(copy):
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bagel_opt.load(copy, check=False)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="changed or truncated"):
        bagel_opt.load(copy, check=False)


def test_settings_that_a_bundle_fixes_are_refused(bundle):
    for settings in ({"dtype": "float16"}, {"profile": "tiny"}, {"attention": "flex"}):
        with pytest.raises(BundleError, match="fixed when it was exported"):
            bagel_opt.load(bundle, **settings)
    with pytest.raises(ValueError, match="backend='compile'"):
        bagel_opt.load(bundle, backend="compile")
    with pytest.raises(ValueError, match="device='cuda'"):
        bagel_opt.load(bundle, device="cuda")


def test_a_request_beyond_the_profile_is_refused(bundle):
    model = bagel_opt.load(bundle)
    with pytest.raises(ProfileError, match=r"needs slots of at least \d+, but profile 'tiny' has slots = 768"):
        model.chat("a b " * 400)


# ---- exporting


def test_export_refuses_bad_settings(tmp_path):
    for settings, error in (
        ({"format": "onyx"}, "format='onyx'"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=error):
            export(CHECKPOINT, tmp_path / "out", PROFILE, **settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export(CHECKPOINT, tmp_path / "out", "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="no bundle"):
        export(CHECKPOINT, tmp_path / "mine", PROFILE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    def interrupt(what, *_):
        if what.startswith("exported"):
            raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess, "Popen", Started)
    with pytest.raises(KeyboardInterrupt):
        export(CHECKPOINT, tmp_path / "out", PROFILE, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert started
    assert all(process.returncode is not None for process in started)


def test_what_fails_in_another_process_is_told():
    with pytest.raises(RuntimeError, match=r"a process of the export failed with status 1: (?s:.*)expected 5, got 4"):
        list(processes.in_processes("bagel_opt.export.onnx:write_programs", "wide", [1, 2]))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A bundle of two profiles in float16, by the documented command."""
    folder = tmp_path_factory.mktemp("half")
    profile = folder / "profile.toml"
    profile.write_text('name = "two"\nrows = 2\nslots = 600\ntext = 64\npatches = 64\nlatents = 64\n')
    command = [sys.executable, "-m", "bagel_opt.export", "--checkpoint", CHECKPOINT, "--format", "onnx"]
    command += ["--profile", profile, "--profile", "tiny", "--out", folder / "out", "--dtype", "float16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder / "out")
    return folder / "out"


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


def test_only_what_an_export_wrote_is_replaced(tmp_path, bundle):
    foreign, mixed = tmp_path / "app", shutil.copytree(bundle, tmp_path / "mixed")
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"name": "a web app"}')
    (mixed / "notes.txt").write_text("precious")
    for folder in (foreign, mixed):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(FileExistsError, match="no bundle"):
            export(CHECKPOINT, folder, PROFILE)
        assert sorted(path.name for path in folder.iterdir()) == before
    older = shutil.copytree(bundle, tmp_path / "older")
    assert _replaceable(older)
    manifest = json.loads((older / MANIFEST).read_text())
    (older / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert _replaceable(older)  # which no longer loads, so it is to be exported again
    (older / "notes.txt").write_text("precious")
    assert not _replaceable(older)


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
