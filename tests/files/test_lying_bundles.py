"""Bundles whose manifest is signed and well formed but does not fit its model, its profile or its files; with check=False."""

import json
import shutil

import numpy as np
import pytest
from bundles import rewrite
from safetensors.numpy import load_file, save_file

import bagel_opt
from bagel_opt import BundleError
from bagel_opt.cli.commands import main
from bagel_opt.files.manifest import FORMAT, MANIFEST, TOKENIZER, WEIGHTS


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture
def archives(two, tmp_path):
    return shutil.copytree(two, tmp_path / "archives")


def change(folder, edit):
    """Edits a manifest, and signs it."""
    data = json.loads((folder / MANIFEST).read_text())
    del data["sha256"]
    edit(data)
    rewrite(folder, **data)


def refused(folder, *words):
    with pytest.raises(BundleError) as caught:
        bagel_opt.load(folder, check=False)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 3000
    for word in (str(folder), *words):
        assert word in message
    return message


def refused_alike(folder, capsys, *words):
    """By `load` and by `inspect`, in the same line, and not because it was changed."""
    message = refused(folder, *words)
    assert "after the export" not in message
    assert main(["inspect", str(folder), "--no-check"]) == 1
    assert capsys.readouterr().err == f"bagel-opt: {message}\n"


# ---- programs

PROGRAMS = {
    "a program is missing": lambda p: p.pop("decode"),
    "a program is missing, of one row": lambda p: p.pop("generate_row"),
    "all are missing": lambda p: p.clear(),
    "a program too many": lambda p: p.update(more=p["text"]),
    "a program of another name": lambda p: p.update(texts=p.pop("text")),
    "two programs exchanged": lambda p: p.update(text=p["vit"], vit=p["text"]),
    "an input is missing": lambda p: p["text"]["inputs"].pop("kv_len"),
    "an input too many": lambda p: p["text"]["inputs"].update(more=[[1], "int64"]),
    "inputs in another order": lambda p: p["text"].update(inputs=dict(reversed(p["text"]["inputs"].items()))),
    "a shorter input": lambda p: p["text"]["inputs"].update(ids=[[1, 8], "int64"]),
    "a huge input": lambda p: p["text"]["inputs"].update(ids=[[1, 10**18], "int64"]),
    "an input below zero": lambda p: p["text"]["inputs"].update(ids=[[1, -64], "int64"]),
    "a size that is a fraction": lambda p: p["text"]["inputs"].update(ids=[[1, 64.0], "int64"]),
    "an input without a size": lambda p: p["text"]["inputs"].update(ids=[[], "int64"]),
    "a free size": lambda p: p["text"]["inputs"].update(ids=[[1, "text"], "int64"]),
    "another dtype": lambda p: p["text"]["inputs"].update(ids=[[1, 64], "float32"]),
    "no output": lambda p: p["text"].update(outputs=[]),
    "an output too many": lambda p: p["text"]["outputs"].append("more"),
    "another output": lambda p: p["text"].update(outputs=["logits"]),
    "no caches": lambda p: p["text"].update(cache_rows=0),
    "caches where there are none": lambda p: p["vit"].update(cache_rows=1),
    "a million rows of caches": lambda p: p["decode"].update(cache_rows=10**6),
    "rows of caches that are a fraction": lambda p: p["text"].update(cache_rows=1.0),
    "no file": lambda p: p["text"].pop("file"),
    "no weights": lambda p: p["text"].pop("weights"),
    "parts": lambda p: p["text"].update(parts={}),
    "weights of no model": lambda p: p["text"]["weights"].append("llm.more.weight"),
    "a weight twice": lambda p: p["text"]["weights"].append(p["text"]["weights"][0]),
    "a weight that steers the terminal": lambda p: p["text"]["weights"].append("\x1b[31m[red]\n"),
}


@pytest.mark.parametrize("edit", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_that_are_not_the_profiles(copy, edit, capsys):
    change(copy, lambda data: edit(data["programs"]["tiny"]))
    refused_alike(copy, capsys, MANIFEST)


def layers(programs):
    return programs["text"]["parts"]["layer"]["weights"]


PARTS = {
    "a part is missing": lambda p: p["text"]["parts"].pop("end"),
    "another part": lambda p: p["text"]["parts"].update(more=p["text"]["parts"]["end"]),
    "no part": lambda p: p["text"].update(parts={}),
    "whole where it is cut": lambda p: p["text"].update(parts={"whole": p["text"]["parts"]["end"]}),
    "cut where it is whole": lambda p: p["step"].update(parts=p["text"]["parts"]),
    "a file": lambda p: p["text"].update(file="text.onnx"),
    "a layer without weights": lambda p: p["text"]["parts"]["layer"].update(weights=[]),
    "a layer's weights of one layer": lambda p: p["text"]["parts"]["layer"].update(
        weights=["llm.lm_head.weight", *layers(p)]
    ),
    "a layer of the other kind": lambda p: p["text"]["parts"].update(layer=p["vit"]["parts"]["layer"]),
    "a layer's weights of no model": lambda p: p["text"]["parts"]["layer"]["weights"].append("llm.layers.{}.more"),
    "a width to fill": lambda p: p["text"]["parts"]["layer"].update(weights=["{:>1000000}", *layers(p)]),
    "a layer's names at the end": lambda p: p["text"]["parts"]["end"].update(weights=layers(p)),
}


@pytest.mark.parametrize("edit", PARTS.values(), ids=PARTS.keys())
def test_parts_that_are_not_the_programs(archives, edit, capsys):
    change(archives, lambda data: edit(data["programs"]["large"]))
    refused_alike(archives, capsys, MANIFEST)


# ---- the rest of the manifest

MANIFESTS = {
    "no programs": lambda d: d.update(programs={}),
    "programs of no profile": lambda d: d["programs"].update(more=d["programs"]["tiny"]),
    "two profiles of a name": lambda d: d.update(profiles=d["profiles"] * 2),
    "another profile's shapes": lambda d: d["profiles"][0].update(text=32),
    "more rows": lambda d: d["profiles"][0].update(rows=4),
    **{f"absurd {name}": lambda d, name=name: d["profiles"][0].update({name: 10**18}) for name in ("rows", "slots")},
    "a fraction": lambda d: d["profiles"][0].update(slots=768.0),
    "a text": lambda d: d["profiles"][0].update(slots="768"),
    "no config": lambda d: d.update(config={}),
    "an unknown size": lambda d: d["config"]["llm"].update(more=1),
    "a missing size": lambda d: d["config"]["llm"].pop("hidden_size"),
    "a part that is none": lambda d: d["config"].update(vae=3),
    "more layers": lambda d: d["config"]["llm"].update(num_hidden_layers=4),
    "absurdly many layers": lambda d: d["config"]["llm"].update(num_hidden_layers=10**5),
    "a fraction of layers": lambda d: d["config"]["llm"].update(num_hidden_layers=3.0),
    "absurdly many blocks": lambda d: d["config"]["vae"].update(num_res_blocks=10**6),
    "absurdly many channels": lambda d: d["config"]["llm"].update(hidden_size=10**18),
    "another vocabulary": lambda d: d["config"]["llm"].update(vocab_size=d["config"]["llm"]["vocab_size"] + 1),
    "a smaller table": lambda d: d["config"].update(latent_side=4),
    "heads that do not divide": lambda d: d["config"]["llm"].update(num_attention_heads=3),
    "a token of no vocabulary": lambda d: d["config"]["special"].update(eos_token_id=10**6),
    "a negative epsilon": lambda d: d["config"]["llm"].update(rms_norm_eps=-1e-6),
    "another kind": lambda d: d.update(kind="export"),
    "another kind's attention": lambda d: d.update(attention="sdpa"),
    "another dtype": lambda d: d.update(dtype="float16"),
    "a dtype that the CPU has not": lambda d: d.update(dtype="bfloat16"),
    "another device's weights": lambda d: d.update(device="cuda"),
    "no version of torch": lambda d: d.update(versions={}),
    "a file that is not listed": lambda d: d["files"].pop("text.onnx"),
    "a file with a name that none has": lambda d: d["files"].update({"\x00": d["files"]["text.onnx"]}),
    "a long name": lambda d: d["files"].update({"a" * 300: d["files"]["text.onnx"]}),
}


@pytest.mark.parametrize("edit", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifests_that_lie(copy, edit, capsys):
    change(copy, edit)
    refused_alike(copy, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        f'{{"format": {FORMAT}, "sha256": "", "a": ' + "[" * 900 + "]" * 900 + "}",
        f'{{"format": {FORMAT}, "sha256": "", "a": "\\ud800"}}',
        '{"format": NaN}',
        "3",
    ],
)
def test_a_manifest_that_is_hardly_json(copy, text):
    (copy / MANIFEST).write_text(text)
    refused(copy, MANIFEST)


# ---- weights and tokenizer


def rewrite_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    change(folder, lambda data: data["files"][WEIGHTS].update(size=(folder / WEIGHTS).stat().st_size))


BIAS = "latent_out.bias"
TENSORS = {
    "missing": lambda t: t.pop(BIAS),
    "surplus": lambda t: t.update({"\x1b[31m": t[BIAS]}),
    "of another name": lambda t: t.update({"[red]more": t.pop(BIAS)}),
    "of another shape": lambda t: t.update({BIAS: t[BIAS][:-1]}),
    "of another dtype": lambda t: t.update({BIAS: t[BIAS].astype(np.float16)}),
    "of no dtype of a model": lambda t: t.update({BIAS: t[BIAS].astype(bool)}),
}


@pytest.mark.parametrize("kind", ["copy", "archives"])
@pytest.mark.parametrize("edit", TENSORS.values(), ids=TENSORS.keys())
def test_weights_that_are_not_the_models(request, kind, edit, capsys):
    folder = request.getfixturevalue(kind)
    rewrite_weights(folder, lambda tensors: None)
    bagel_opt.load(folder, check=False)
    rewrite_weights(folder, edit)
    refused_alike(folder, capsys, WEIGHTS)


@pytest.mark.parametrize(
    "damage", [lambda text: b"[" * len(text), lambda text: text.replace(b"<|im_end|>", b"<|im_END|>")]
)
def test_a_tokenizer_that_is_not_the_models(copy, damage):
    text = (copy / TOKENIZER).read_bytes()
    (copy / TOKENIZER).write_bytes(damage(text))
    assert (copy / TOKENIZER).stat().st_size == len(text)
    refused(copy, TOKENIZER)
