"""BAGEL as other programs lay it out: the official answers, from files as those programs' own code writes them."""

import json
import shutil

import pytest
import torch
from checkpoints import assert_same, edit_json, weights
from forms import comfyui, comfyui_notes, fails, veomni
from safetensors.torch import load_file, save_file
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt.files.checkpoint import Checkpoint

SMALL = ("tokenizer.json", "ae.safetensors", "config.json", "preprocessor_config.json")  # what ComfyUI's file lacks


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "base")


def answers(model):
    """As the official code's."""
    for case in [case for case in cases() if case.name in ("image_editing", "image_understanding")]:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        if events:
            assert case.velocity_error(events) < 1e-4
        case.check_outputs(outputs)


# ---- one file


def test_a_file_with_what_is_beside_it(base):
    """It counts alone: what the folder has besides weights goes with it."""
    (base / "ema.safetensors").rename(base / "step-7.safetensors")
    save_file({"llm2vae.bias": torch.zeros(3)}, base / "model.safetensors")
    assert_same(weights(base / "step-7.safetensors"), weights(CHECKPOINT))
    (base / "ae.safetensors").unlink()
    fails("ae.safetensors is missing", kind=FileNotFoundError, source=base / "step-7.safetensors")
    with_vae = Checkpoint(base / "step-7.safetensors", CHECKPOINT / "ae.safetensors")
    assert_same(dict(with_vae.load(torch.device("cpu"), torch.float32).named_parameters()), weights(CHECKPOINT))
    fails("model.safetensors", "missing", source=base / "model.safetensors", weights=CHECKPOINT / "ae.safetensors")


# ---- ComfyUI


def test_comfyui_over_a_base(tmp_path):
    """The base is the VAE, the tokenizer and what says how large the VAE is."""
    base = tmp_path / "base"
    base.mkdir()
    for name in SMALL:
        shutil.copy(CHECKPOINT / name, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"vae_config": config["vae_config"]}))
    answers(bagel_opt.load(base, weights=comfyui(tmp_path / "bagel-7b-mot-fp32.safetensors"), device="cpu"))


def test_comfyui_by_itself(tmp_path):
    """Beside a VAE and a tokenizer; the VAE's sizes are those of its tensors."""
    for name in ("tokenizer.json", "ae.safetensors", "preprocessor_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    path = comfyui(tmp_path / "bagel.safetensors")
    answers(bagel_opt.load(path, device="cpu"))
    (tmp_path / "ae.safetensors").unlink()
    fails("ae.safetensors is missing", kind=FileNotFoundError, source=path)
    assert Checkpoint(path, CHECKPOINT / "ae.safetensors").config == Checkpoint(CHECKPOINT).config
    (tmp_path / "tokenizer.json").unlink()
    fails("tokenizer.json is missing", kind=FileNotFoundError, source=path, weights=CHECKPOINT / "ae.safetensors")


def test_what_comfyui_says_counts_for_its_weights(base, tmp_path):
    notes = comfyui_notes()
    notes["model_configs"]["llm_config.json"]["rope_theta"] = 5000.0
    path = comfyui(tmp_path / "bagel.safetensors", notes)
    assert Checkpoint(base, path).config.llm.rope_theta == 5000.0


def test_what_comfyui_has_in_a_file_beside(base, tmp_path):
    (base / "llm_config.json").unlink()
    edit_json(base, "config.json", llm_config=None)
    path = tmp_path / "bagel.safetensors"
    shutil.copy(CHECKPOINT / "ema.safetensors", path)
    fails("llm_config.json is missing", kind=FileNotFoundError, source=base, weights=path)
    beside = tmp_path / "bagel.safetensors.comfyui-bagel.json"
    data = {"format": "comfyui_bagel_sidecar", "format_version": 1, "metadata": comfyui_notes()}
    beside.write_text(json.dumps(data))
    assert Checkpoint(base, path).config == Checkpoint(CHECKPOINT).config
    beside.write_text("{}")
    fails(str(beside), "is not of format 'comfyui_bagel'", source=base, weights=path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("{", "comfyui_bagel in the header of"),
        ("{", "is not valid JSON"),
        ('{"format": "comfyui_bagel", "format": "x"}', "is there twice"),
        ("[1]", "is not of format 'comfyui_bagel', version 1"),
        (comfyui_notes() | {"format_version": 2}, "version 1"),
        (comfyui_notes() | {"model_configs": ["llm_config.json"]}, "with objects in model_configs"),
        (comfyui_notes() | {"model_configs": {"llm_config.json": 1}}, "with objects in model_configs"),
        (comfyui_notes() | {"special_token_ids": {"<|im_end|>": 3}}, "<|im_end|> is 3, and here it is 270"),
        (comfyui_notes() | {"model_configs": {"llm_config.json": {}}}, "lacks 'hidden_size'"),
    ],
    ids=range(9),
)
def test_what_comfyui_does_not_write(base, tmp_path, change, word):
    fails(word, source=base, weights=comfyui(tmp_path / "bagel.safetensors", change))


# ---- VeOmni


@pytest.fixture
def modules(tmp_path):
    return veomni(tmp_path / "veomni")


def test_veomni(modules):
    model = bagel_opt.load(modules, device="cpu")
    assert model.config == bagel_opt.load(CHECKPOINT, device="cpu").config
    answers(model)


def test_veomni_in_shards_and_without_tables(modules):
    """As it saves after training: files of at most 5 GB. Tables are computed where they are not there."""
    folder = modules / "bagel_qwen2_mot"
    every = load_file(folder / "model.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(every)}
    for shard in set(shards.values()):
        save_file({name: every[name] for name in every if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    flow = load_file(modules / "bagel_flow_connector" / "model.safetensors")
    del flow["latent_pos_embed.pos_embed"]
    save_file(flow, modules / "bagel_flow_connector" / "model.safetensors")
    got, want = weights(modules), weights(CHECKPOINT)
    assert got.pop("latent_position.weight").shape == (64**2, 64)
    del want["latent_position.weight"]
    assert_same(got, want)


def test_some_of_veomnis_folders_over_a_base(modules, base):
    """What was trained; the rest is the base's."""
    save_file({n: t + 1 for n, t in load_file(base / "ema.safetensors").items()}, base / "ema.safetensors")
    for name in ("bagel_vae", "bagel_siglip_navit", "bagel_text_encoder"):
        shutil.rmtree(modules / name)
    got, want, other = Checkpoint(base, modules), weights(CHECKPOINT), weights(base)
    found = dict(got.load(torch.device("cpu"), torch.float32).named_parameters())
    for name, tensor in found.items():
        ours = name.startswith(("llm.layers", "llm.norm", "latent_", "time.", "vae."))
        assert torch.equal(tensor, (want if ours else other)[name]), name
    edit_json(base, "preprocessor_config.json", vit={"max_size": 56, "min_size": 28, "stride": 14})
    alone = base.parent / "alone"
    alone.mkdir()
    veomni(base.parent / "other").joinpath("bagel_vae").rename(alone / "bagel_vae")
    edit_json(alone / "bagel_vae", "config.json", max_image_size=64)
    sizes = Checkpoint(base, alone).config
    assert (sizes.vae_resize.max_size, sizes.vit_resize.max_size) == (64, 56)
    fails("veomni lacks bagel_text_encoder, bagel_siglip_navit, bagel_vae", kind=FileNotFoundError, source=modules)


def test_what_is_wrong_with_veomnis_folders(modules):
    copied = modules / "bagel_siglip_navit" / "model.safetensors"
    save_file(load_file(copied) | {"model.norm.weight": torch.zeros(64)}, copied)
    fails("both have tensor language_model.model.norm.weight", source=modules)
    shutil.copy(modules / "bagel_vae" / "model.safetensors", copied)
    fails("both have tensor vae.", source=modules)
    (modules / "bagel_vae" / "config.json").write_text("[]")
    (modules / "bagel_siglip_navit" / "model.safetensors").unlink()
    fails("bagel_siglip_navit has no weights", kind=FileNotFoundError, source=modules)
    shutil.rmtree(modules / "bagel_siglip_navit")
    fails("bagel_vae/config.json holds list", source=CHECKPOINT, weights=modules)
    (modules / "bagel_text_encoder" / "config.json").write_text("{")
    fails("bagel_text_encoder/config.json is not valid JSON", source=CHECKPOINT, weights=modules)


def test_a_config_of_transformers_5(base):
    """Which has rope_theta in an object of its own."""
    for name in ("llm_config.json", "config.json"):
        data = json.loads((base / name).read_text())
        section = data.get("llm_config", data)
        section["rope_parameters"] = {"rope_theta": section.pop("rope_theta"), "rope_type": "default"}
        (base / name).write_text(json.dumps(data))
    assert Checkpoint(base).config == Checkpoint(CHECKPOINT).config
    edit_json(base, "llm_config.json", rope_parameters={"rope_theta": 1e6, "rope_type": "yarn"})
    fails("rope_scaling", source=base)
