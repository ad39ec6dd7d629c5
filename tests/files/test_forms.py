"""The forms in which people have BAGEL: each made from the golden checkpoint, and read as the official code answers."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from checkpoints import assert_same, weights
from forms import fails
from safetensors.torch import load_file, save_file
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt.files.checkpoint import Checkpoint

TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


@pytest.fixture
def base(tmp_path):
    """A copy of the golden checkpoint."""
    return shutil.copytree(CHECKPOINT, tmp_path / "base")


def tensors():
    return load_file(CHECKPOINT / "ema.safetensors")


def without(folder, *names):
    for name in names:
        (folder / name).unlink()


def renamed(folder, name):
    without(folder, "model.safetensors.index.json")
    (folder / "ema.safetensors").rename(folder / name)


def model_file(folder):
    renamed(folder, "model.safetensors")


def model_bf16(folder):
    renamed(folder, "model_bf16.safetensors")


def model_bf16_and_the_base_index(folder):
    (folder / "ema.safetensors").rename(folder / "model_bf16.safetensors")


def one_of_any_name(folder):
    renamed(folder, "checkpoint-1000.safetensors")


def without_tables(folder):
    save_file({n: t for n, t in tensors().items() if n not in TABLES}, folder / "ema.safetensors")


def with_buffers(folder):
    extra = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    extra["language_model.model.rotary_emb.inv_freq"] = torch.ones(8)
    extra["vit_model.vision_model.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors() | extra, folder / "ema.safetensors")


def without_tokenizer_json(folder):
    without(folder, "tokenizer.json")


def without_config_json(folder):
    without(folder, "config.json", "tokenizer.json")


FORMS = [model_file, model_bf16, model_bf16_and_the_base_index, one_of_any_name, without_tables, with_buffers]
FORMS += [without_tokenizer_json, without_config_json]


@pytest.mark.parametrize("form", FORMS)
def test_forms_give_the_official_answers(base, form):
    form(base)
    model = bagel_opt.load(base, device="cpu")
    for case in [case for case in cases() if case.name in ("image_editing", "understanding_think")] or cases()[:2]:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        assert case.velocity_error(events) < 1e-4
        case.check_outputs(outputs)


# ---- weights over a base


def halves():
    """The golden weights, in two parts."""
    every = tensors()
    first = {name: every[name] for name in list(every)[::2]}
    return first, {name: every[name] for name in every.keys() - first.keys()}


@pytest.mark.parametrize("where", ["file", "folder", "whole folder"])
def test_weights_over_a_base(base, tmp_path, caplog, where):
    """Half of them changed in the base, and right in what lies over it."""
    first, second = halves()
    save_file({**{name: torch.zeros_like(t) for name, t in first.items()}, **second}, base / "ema.safetensors")
    over = tmp_path / "over"
    over.mkdir()
    save_file(first, over / "model.safetensors")
    if where == "whole folder":
        shutil.copy(CHECKPOINT / "ae.safetensors", over)
    with caplog.at_level(logging.INFO, "bagel_opt"):
        model = bagel_opt.load(base, weights=over / "model.safetensors" if where == "file" else over, device="cpu")
    total = len(tensors()) + len(load_file(CHECKPOINT / "ae.safetensors"))
    count = len(first) + (total - len(tensors()) if where == "whole folder" else 0)
    assert f"{count} tensors are of {over}" in caplog.text
    assert f", {total - count} of {base}" in caplog.text
    want = dict(bagel_opt.load(CHECKPOINT, device="cpu").runtime.model.named_parameters())
    assert_same(dict(model.runtime.model.named_parameters()), want)


@pytest.mark.parametrize("index", [False, True])
def test_a_base_without_a_transformer(base, tmp_path, index):
    """Also where its index was copied along."""
    (base / "ema.safetensors").rename(tmp_path / "mine.safetensors")
    if not index:
        without(base, "model.safetensors.index.json")
    found = Checkpoint(base, tmp_path / "mine.safetensors").load(torch.device("cpu"), torch.float32)
    assert_same(dict(found.named_parameters()), weights(CHECKPOINT))


def test_which_of_several_files_is_said(base, caplog):
    """The official code reads ema.safetensors; who trained it may want the other."""
    other = {name: tensor + 1 for name, tensor in tensors().items()}
    save_file(other, base / "model.safetensors")
    [note] = Checkpoint(base).notes
    assert "taking ema.safetensors" in note
    assert f"weights={base / 'model.safetensors'}" in note
    assert_same(weights(base), weights(CHECKPOINT))
    chosen = Checkpoint(base, base / "model.safetensors")
    assert chosen.places["llm2vae.bias"][0].name == "model.safetensors"


@pytest.mark.parametrize("name", ["ema-FP8.safetensors", "ema-fp8.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_without_scales(base, name, dtype):
    """A plain cast: each number as it stands in the file."""
    eight = {n: t.to(torch.float8_e4m3fn) for n, t in tensors().items()}
    without(base, "ema.safetensors", "model.safetensors.index.json")
    save_file(eight, base / name)
    got = dict(Checkpoint(base).load(torch.device("cpu"), dtype).named_parameters())
    plain = {n: t.float() for n, t in eight.items()}
    save_file(plain, base / "ema.safetensors")
    want = dict(Checkpoint(base).load(torch.device("cpu"), dtype).named_parameters())
    assert_same(got, want)


def test_a_tokenizer_from_its_parts(base):
    """The same numbers as from tokenizer.json, and back."""
    whole = Checkpoint(base).tokenizer
    without(base, "tokenizer.json")
    parts = Checkpoint(base).tokenizer
    texts = [
        "a red circle",
        "It's 12345 o'clock!\r\n\n  Füße\tß",
        "<|im_start|>x<|vision_end|>",
        "日本語 🙂 e\u0301",
        "",
    ]
    for text in texts:
        assert parts.encode(text) == whole.encode(text), text
        assert parts.decode(parts.block(text)) == whole.decode(whole.block(text))
    assert (parts.special, parts.largest_id) == (whole.special, whole.largest_id)
    parts.write(base / "tokenizer.json")
    assert [Checkpoint(base).tokenizer.encode(text) for text in texts] == [whole.encode(text) for text in texts]


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("language_model.model.layers.0.self_attn.q_proj.qweight", "GPTQ"),
        ("language_model.model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("language_model.model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("language_model.model.layers.0.self_attn.q_proj.weight_scale", "FP8 with scales"),
        ("scaled_fp8", "FP8 with scales"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "--lora"),
    ],
)
def test_other_layouts_are_named(base, name, word):
    save_file(tensors() | {name: torch.zeros(4)}, base / "ema.safetensors")
    fails("ema.safetensors", word, name, source=base)


@pytest.mark.parametrize(
    ("suffix", "word"), [("gguf", "GGUF"), ("bin", "pickled"), ("pt", "pickled"), ("ckpt", "pickled")]
)
def test_other_formats_are_named(base, tmp_path, suffix, word):
    (path := tmp_path / f"bagel.{suffix}").write_bytes(b"GGUF")
    fails(str(path), word, "safetensors", source=base, weights=path)
    without(base, "ema.safetensors", "model.safetensors.index.json")
    shutil.copy(path, base)
    fails(path.name, word, source=base)


def test_what_is_missing_says_what_to_do(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Checkpoint(base, tmp_path / "nowhere.safetensors")
    save_file({"something.else": torch.zeros(2)}, tmp_path / "other.safetensors")
    fails("1 tensor surplus: something.else", "over", source=base, weights=tmp_path / "other.safetensors")
    without(base, "ae.safetensors")
    fails("ae.safetensors is missing", kind=FileNotFoundError, source=base)


def test_two_files_with_the_same_tensor(base):
    every = tensors()
    names = list(every)
    save_file({n: every[n] for n in names[:20]}, base / "a.safetensors")
    save_file({n: every[n] for n in names[19:]}, base / "b.safetensors")
    without(base, "ema.safetensors")
    index = {"weight_map": {name: "a.safetensors" if i < 20 else "b.safetensors" for i, name in enumerate(names)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("a.safetensors both have tensor", names[19], source=base)


def test_a_truncated_index(base):
    """Cut off in the middle, without some of its lines, or without one of its files."""
    every = tensors()
    names = list(every)
    save_file({n: every[n] for n in names[:20]}, base / "a.safetensors")
    save_file({n: every[n] for n in names[20:]}, base / "b.safetensors")
    without(base, "ema.safetensors")
    index = {"weight_map": {name: "a.safetensors" if i < 20 else "b.safetensors" for i, name in enumerate(names)}}
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps(index)[:-20])
    fails(f"{path} is not valid JSON", source=base)
    path.write_text(json.dumps({"weight_map": dict(list(index["weight_map"].items())[:20])}))
    fails(f"{len(names) - 20 - len(TABLES)} tensors missing", source=base)
    path.write_text(json.dumps(index))
    without(base, "b.safetensors")
    fails(f"{base / 'b.safetensors'} is missing", kind=FileNotFoundError, source=base)


def test_several_files_and_none_of_a_known_name(base):
    renamed(base, "step-1.safetensors")
    shutil.copy(base / "step-1.safetensors", base / "step-2.safetensors")
    fails("name the file to take", "step-1.safetensors, step-2.safetensors", kind=FileNotFoundError, source=base)


def test_a_bundle_has_its_weights(bundle):
    for settings in ({"weights": "a.safetensors"}, {"lora": ["a"]}):
        with pytest.raises(bagel_opt.BundleError, match=next(iter(settings))):
            bagel_opt.load(bundle, **settings)


def test_sine_tables_reach_as_far_as_the_official_ones(base):
    """Of 64 latents a side, and as many patches as the ViT's own table: they begin as the golden checkpoint's do."""
    without_tables(base)
    c = Checkpoint(base).config
    assert (c.latent_side, c.vit_side) == (64, 8)
    made = weights(base)
    for name, side in (("latent_position.weight", 64), ("vit_position.weight", 8)):
        want = weights(CHECKPOINT)[name].reshape(8, 8, -1)
        assert np.array_equal(made[name].reshape(side, side, -1)[:8, :8], want)
