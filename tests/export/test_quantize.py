"""Checkpoints in 8 and 4 bits: written once, read as they are."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import forms
import numpy as np
import pytest
import torch
from adapters import BOTH, adapted
from checkpoints import assert_same, edit_json
from safetensors.torch import load_file, save_file
from support import CHECKPOINT, ODD, ROOT, cases

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.errors import CheckpointError
from bagel_opt.export import export, placing
from bagel_opt.export.quantize import quantize
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.loading import shipped_model
from bagel_opt.model.quantized import Quantized

TABLE = {"gen": "fp8", "vit": "int8", "head": "int4", "embeddings": "int8"}
Q = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"
FILES = {
    "ae.safetensors",
    "config.json",
    "llm_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "vit_config.json",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The golden checkpoint in int8; not to be changed."""
    return quantize(CHECKPOINT, tmp_path_factory.mktemp("int8") / "quantized", "int8")


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "quantized")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapter")
    adapted(seed=2, targets=BOTH, r=6).save_pretrained(place)
    return place


def load(place, **settings):
    return bagel_opt.load(place, **{"device": "cpu", **settings})


def parameters(model):
    return {name: (p.dtype, bits(p)) for name, p in model.runtime.model.named_parameters()}


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plain_cast(home):
    """All but the VAE in FP8 without scales."""
    folder = shutil.copytree(CHECKPOINT, home / "checkpoint")
    every = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(CHECKPOINT / "ema.safetensors").items()}
    save_file(every, folder / "ema.safetensors")
    return folder


def with_options(home):
    """That it recommends."""
    folder = shutil.copytree(CHECKPOINT, home / "checkpoint")
    edit_json(folder, "config.json", generation={"cfg_renorm_min": 1.0, "cfg_interval": [0.0, 1.0], "stop": ["END"]})
    return folder


SOURCES = {
    "golden": lambda home: CHECKPOINT,
    "odd": lambda home: ODD / "checkpoint",
    "shipped": lambda home: None,
    "dfloat11": lambda home: forms.dfloat11(shutil.copytree(CHECKPOINT, home / "checkpoint")),
    "veomni": lambda home: forms.veomni(home / "checkpoint"),
    "plain cast": plain_cast,
    "with options": with_options,
}


SLOW = {"dfloat11": pytest.mark.second}


@pytest.mark.parametrize(
    ("source", "quantization"),
    [
        ("golden", "fp8"),
        ("golden", "int4"),
        ("golden", TABLE),
        *(pytest.param(source, "int8", marks=SLOW.get(source, ())) for source in SOURCES),
    ],
    ids=str,
)
def test_the_same_bits_as_of_quantising_while_loading(tmp_path, source, quantization):
    place = SOURCES[source](tmp_path)
    out = quantize(place, tmp_path / "quantized", quantization)
    for dtype in ("float32", "bfloat16"):
        got, want = load(out, dtype=dtype), load(place, dtype=dtype, quantization=quantization)
        assert parameters(got) == parameters(want)
    assert got.config == want.config
    assert got.examples == want.examples
    assert got.tokenizer.encode("a red circle, 12!") == want.tokenizer.encode("a red circle, 12!")
    assert parameters(load(out, dtype=dtype, quantization=quantization)) == parameters(want)


@pytest.mark.parametrize("quantization", ["int8", TABLE], ids=str)
def test_with_weights_and_adapters(tmp_path, adapter, quantization):
    """What they bring is quantised with the rest; what an adapter changes elsewhere is not rounded."""
    over = tmp_path / "over.safetensors"
    save_file({Q: torch.randn_like(load_file(CHECKPOINT / "ema.safetensors")[Q])}, over)
    given = {"weights": over, "lora": [(adapter, 0.5)]}
    out = quantize(CHECKPOINT, tmp_path / "quantized", quantization, **given)
    assert parameters(load(out)) == parameters(load(CHECKPOINT, quantization=quantization, **given))
    assert parameters(load(out)) != parameters(load(CHECKPOINT, quantization=quantization))


@pytest.mark.parametrize("name", ["image_editing", "text_to_image_think", "text_only"])
def test_the_same_answers(written, name):
    case = next(case for case in cases() if case.name == name)
    models = load(written), load(CHECKPOINT, quantization="int8")
    for got, want in zip(*(model.run(case.inputs, **case.options) for model in models), strict=True):
        assert got == want if isinstance(want, str) else np.array_equal(got, want)


def test_what_is_in_the_folder(written):
    """The published names; a scale beside each weight in codes, and all else as it was."""
    assert {path.name for path in written.iterdir()} == FILES
    plain, found = load_file(CHECKPOINT / "ema.safetensors"), load_file(written / "model.safetensors")
    assert_same(load_file(written / "ae.safetensors"), load_file(CHECKPOINT / "ae.safetensors"))
    products = {name for name in found if name.endswith(("_proj.weight", "_proj_moe_gen.weight"))}
    products = {name for name in products if name.startswith("language_model.")}
    assert len(products) == 3 * 2 * 7
    scales = {f"{name}_scale" for name in products}
    assert found.keys() == plain.keys() | scales
    assert_same(
        {name: found[name] for name in plain.keys() - products}, {name: plain[name] for name in plain.keys() - products}
    )
    for name in products:
        codes, scale = found[name], found[f"{name}_scale"]
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, codes.shape[:1])
        assert ((codes * scale[:, None] - plain[name]).abs() <= 0.501 * scale[:, None]).all()
    said = json.loads((written / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "bagel_opt", "version": 1, "parts": {"und": "int8", "gen": "int8"}}


def test_it_is_not_quantised_again(written, monkeypatch):
    monkeypatch.setattr(Quantized, "store", None)
    load(written)


def test_adapters_apart(written, adapter):
    options = {"num_timesteps": 3, "height": 64, "width": 64, "seed": 0}
    pictures = [
        model.generate("a cat", **options)
        for model in (
            load(written, adapters={"a": adapter}),
            load(CHECKPOINT, quantization="int8", adapters={"a": adapter}),
            load(written),
        )
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


# ---- what is refused


def refused(match, call, *arguments, error=ValueError, **settings):
    with pytest.raises(error, match=match) as told:
        call(*arguments, **settings)
    assert "\n" not in str(told.value)


def test_arguments_that_it_does_not_take(written, adapter, tmp_path):
    for quantization in ("fp8", {"gen": "int8"}):
        refused(r"quantized is quantised, .* cannot change", load, written, quantization=quantization)
    refused(r"is quantised, and lora go into plain weights: load what", load, written, lora=adapter)
    refused(r"is quantised, and weights go into plain weights", load, written, weights=CHECKPOINT)
    for over in (written, written / "model.safetensors"):
        refused(r"is a whole quantised model; give it as the checkpoint", load, CHECKPOINT, weights=over)
    refused(r"is quantised already; quantise the checkpoint", quantize, written, tmp_path / "out", "int8")
    refused(r"is quantised, .*; ONNX bundles take", export, written, tmp_path / "out", "demo", dtype="float16")
    for nothing in ({}, None):
        refused(r"quantization=.* leaves all as it is", quantize, CHECKPOINT, tmp_path / "out", nothing)
    refused(r"quantization='nf4'; allowed", quantize, CHECKPOINT, tmp_path / "out", "nf4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": None},
        {"parts": {}},
        {"parts": {"und": "nf4"}},
        {"parts": {"vae": "int8"}},
        {"parts": ["und"]},
        {"parts": {"und": ["int8"]}},
        {"parts": {"x" * 9999: "int8"}},
    ],
    ids=lambda value: str(value)[:30],
)
def test_schemes_that_are_not_known(folder, changes):
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder, "config.json", quantization_config=said | changes)
    refused("as quantization_config, which this bagel_opt does not know", load, folder, error=CheckpointError)


@pytest.mark.parametrize("scheme", [None, {"quant_method": "compressed-tensors"}], ids=str)
def test_without_its_scheme_it_is_of_others(folder, scheme):
    edit_json(folder, "config.json", quantization_config=scheme)
    refused("holds FP8 with scales", load, folder, error=CheckpointError)


def damaged(folder, **changes):
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({f"{Q}_scale": None}, r"1 tensor missing: .*q_proj_moe_gen\.weight_scale"),
        ({f"{Q}_scale": torch.ones(3)}, r"mis-shaped: .*q_proj_moe_gen\.weight_scale is \[3\]"),
        ({f"{Q}_scale": torch.ones(64).half()}, r"not of their kind: .*weight_scale is float16, not float32"),
        ({Q: torch.zeros(64, 64)}, r"not of their kind: .*q_proj_moe_gen\.weight is float32, not int8"),
        ({Q: torch.zeros(64, 64).to(torch.float8_e4m3fn)}, r"q_proj_moe_gen\.weight is float8_e4m3fn, not int8"),
        ({"llm2vae.weight": torch.zeros(64, 64, dtype=torch.int8)}, r"llm2vae\.weight is int8"),
        ({"llm2vae.weight_scale": torch.ones(64)}, r"1 tensor surplus: llm2vae\.weight_scale"),
        ({"scaled_fp8": torch.ones(1)}, r"FP8 with scales \(scaled_fp8\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_files_that_are_not_as_config_json_says(folder, changes, match):
    damaged(folder, **changes)
    refused(match, load, folder, error=CheckpointError)


def test_config_json_of_other_parts(folder):
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder, "config.json", quantization_config=said | {"parts": {"gen": "int8"}})
    refused("surplus: .*weight_scale", load, folder, error=CheckpointError)


# ---- putting it in its place


def test_a_folder_that_holds_something(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    refused("out exists and is not empty; choose", quantize, CHECKPOINT, out, "int8", error=FileExistsError)
    refused("exists and is not empty", quantize, CHECKPOINT, out / "notes.txt", "int8", error=FileExistsError)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    load(quantize(CHECKPOINT, out, "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_came_there_meanwhile_stays(tmp_path):
    out = tmp_path / "out"

    def meanwhile(done, total):
        if done == total:
            out.mkdir()
            (out / "notes.txt").write_text("precious")

    refused("not empty", quantize, CHECKPOINT, out, "int8", progress=meanwhile, error=FileExistsError)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    sizes = namedtuple("usage", "total used free")
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda path: sizes(10**9, 0, 10**6))
    refused("the weights take .* GB, and 0.001 GB are free", quantize, CHECKPOINT, tmp_path / "a", "fp8", error=OSError)
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from bagel_opt.cli.commands import main
from bagel_opt.export import quantize

write = quantize.write_weights

def fills(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
    return write(*arguments)

quantize.write_weights = fills
raise SystemExit(main(["quantize", sys.argv[1], "--out", sys.argv[2], "--quantization", "int8"]))
"""


def test_a_full_disk_is_told_in_one_line(tmp_path):
    out = tmp_path / "out"
    command, env = [sys.executable, "-c", FULL, CHECKPOINT, out], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"bagel-opt: [Errno 27] File too large: '{out}'"]
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from bagel_opt.export.quantize import quantize

kill = lambda done, total: done == total and os.kill(os.getpid(), signal.SIGKILL)
quantize(sys.argv[1], sys.argv[2], "int8", progress=kill)
"""


def test_one_that_is_killed_leaves_nothing_that_loads(tmp_path):
    """And the next one cleans up."""
    out = tmp_path / "out"
    command, env = [sys.executable, "-c", KILLED, CHECKPOINT, out], {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=env, timeout=300).returncode == -9
    assert not out.exists()
    assert list(tmp_path.iterdir())
    load(quantize(CHECKPOINT, out, "int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- the command


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # so that no long path wraps
    out = tmp_path / "out"
    kinds = ",".join(f"{part}={kind}" for part, kind in TABLE.items())
    assert main(["quantize", str(CHECKPOINT), "--quantization", kinds, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Checkpoint(out).kinds == TABLE
    assert main(["inspect", str(out), "--profile", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "BAGEL as `bagel-opt quantize` writes it, gen in fp8, vit in int8, head in int4, embeddings in int8" in shown
    assert f"--checkpoint {out}" in shown
    assert main(["quantize", str(CHECKPOINT), "--quantization", "fp4", "--out", str(out / "b")]) == 1
    assert capsys.readouterr().err.startswith("bagel-opt: quantization='fp4'; allowed")


def test_inspect_reckons_a_byte_for_each_code(tmp_path, capsys):
    def told(place):
        assert main(["inspect", str(place), "--profile", "demo", "--dtype", "float32"]) == 0
        line = capsys.readouterr().out.rpartition("demo")[2]
        return float(line.split("│")[1].split()[0])

    plain = shipped_model()
    out = quantize(plain, tmp_path / "out", "int8")
    model = load(out).runtime.model
    assert told(out) == pytest.approx(sum(p.nbytes for p in model.parameters()) / 1e6, rel=0.01)
    assert told(plain) > 2 * told(out)
