"""Lance checkpoints as they are published: layouts, pickles, and what is missing or wrong."""

import json
import pickle
import re
import shutil

import pytest
import torch
from lance_cases import CHECKPOINT, cases
from safetensors.torch import load_file, save_file

import bagel_opt
from bagel_opt import CheckpointError
from bagel_opt.files import lance
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.convert import convert
from bagel_opt.files.parameters import parameter_shapes
from bagel_opt.model.families import build

CASE = next(case for case in cases() if case.name == "t2i_no_cfg")
FEW = {"num_timesteps": 2, "seed": 0, "height": 32, "width": 32}


@pytest.fixture
def folder(tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(CHECKPOINT, tmp_path / "lance")


def answers(source, case=CASE, **given):
    case.check_outputs(bagel_opt.load(source, device="cpu", **given).run(case.inputs, **case.options))


def test_shapes_are_the_models():
    config = Checkpoint(CHECKPOINT).config
    with torch.device("meta"):
        model = build(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_either_folder_is_found(folder):
    answers(folder / "Lance_3B")
    (folder / "Lance_3B").rename(folder / "Lance_3B_Video")
    answers(folder)
    answers(folder / "Lance_3B_Video")


def test_of_two_models_each_draws_what_it_was_trained_for(folder):
    shutil.copytree(folder / "Lance_3B", folder / "Lance_3B_Video")
    pictures, videos = (bagel_opt.load(place, device="cpu") for place in (folder, folder / "Lance_3B_Video"))
    assert "Lance_3B, which draws images; Lance_3B_Video beside it is another model" in Checkpoint(folder).notes[0]
    pictures.generate("a", **FEW)
    videos.generate("a", output="video", num_frames=5, **FEW)
    for model, output, other in ((pictures, "video", "image"), (videos, "image", "video")):
        with pytest.raises(
            ValueError, match=f"^output='{output}': this model was trained to draw {other}s; load the other"
        ):
            model.generate("a", output=output, **FEW)


def test_ema_where_there_is_no_model_file(folder):
    weights = folder / "Lance_3B" / "model.safetensors"
    shutil.copy(weights, weights.with_name("ema.safetensors"))
    assert any("taking model.safetensors" in note for note in Checkpoint(folder).notes)
    weights.unlink()
    answers(folder)


def test_a_fine_tune_that_has_the_vit_and_the_table(folder):
    """The training code saves whole models: theirs counts in place of the ViT's file, and the table is computed."""
    path, vit = folder / "Lance_3B" / "model.safetensors", folder / lance.VIT / lance.VIT_FILE
    tensors = load_file(path) | {f"vit_model.{name}": tensor for name, tensor in load_file(vit).items()}
    save_file(tensors | {lance.DROPPED: torch.zeros(7, 64)}, path)
    vit.unlink()
    answers(folder, next(case for case in cases() if case.name == "x2t_image"))


def test_weights_over_a_checkpoint(folder):
    path = folder / "Lance_3B" / "model.safetensors"
    tensors = load_file(path)
    save_file({"llm2vae.bias": tensors["llm2vae.bias"].clone()}, over := folder / "tuned.safetensors")
    save_file(tensors | {"llm2vae.bias": tensors["llm2vae.bias"] + 9}, path)
    answers(folder, weights=over)


def to_pickle(folder):
    vae = folder / lance.VAE_FILE
    torch.save(load_file(vae), pickled := folder / lance.VAE_PICKLE)
    vae.unlink()
    return pickled


def test_a_pickle_is_refused_and_converted(folder):
    pickled = to_pickle(folder)
    with pytest.raises(
        CheckpointError, match=r"Wan2\.2_VAE\.pth is pickled by PyTorch.*; `bagel-opt convert .*` reads"
    ):
        bagel_opt.load(folder)
    assert convert(folder) == folder / lance.VAE_FILE
    answers(folder)
    (folder / lance.VAE_FILE).unlink()
    (folder / "other").mkdir()
    assert convert(pickled, folder / "other") == folder / "other" / lance.VAE_FILE
    pickled.unlink()
    with pytest.raises(FileNotFoundError, match=r"it is published as a pickle, of which `bagel-opt convert`"):
        bagel_opt.load(folder)
    with pytest.raises(FileNotFoundError, match=r"Wan2\.2_VAE\.pth is missing"):
        convert(folder)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/lance-was-here", "w"))


@pytest.mark.parametrize("content", [Evil(), {"a": Evil()}, [torch.zeros(1)], {"a": 1}, b"no pickle", b""])
def test_other_pickles_are_refused(folder, content, tmp_path):
    pickled = to_pickle(folder)
    if isinstance(content, bytes):
        pickled.write_bytes(content)
    elif isinstance(content, Evil) or "Evil" in str(content):
        pickled.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, pickled)
    with pytest.raises(
        CheckpointError, match=r"Wan2\.2_VAE\.pth (is no (plain )?pickle of tensors|holds something else)"
    ) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice, to run what is in it
    assert not (folder / lance.VAE_FILE).exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("Lance_3B/model.safetensors", "has no weights"),
        ("Lance_3B/tokenizer.json", None),  # vocab.json and merges.txt say the same
        ("Qwen2.5-VL-ViT/vit.safetensors", r"vit\.safetensors is missing; copy the whole checkpoint there"),
        ("Qwen2.5-VL-ViT/config.json", r"config\.json is missing; a Lance checkpoint has it"),
        ("Wan2.2_VAE.safetensors", r"Wan2\.2_VAE\.safetensors is missing"),
    ],
)
def test_what_is_missing(folder, file, message):
    (folder / file).unlink()
    if message is None:
        return answers(folder)
    with pytest.raises(FileNotFoundError, match=message):
        bagel_opt.load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("Lance_3B/llm_config.json", {"hidden_size": 60}, "hidden_size|head|mrope_section"),
        ("Lance_3B/llm_config.json", {"rope_scaling": {"mrope_section": [2, 3, 2]}}, r"mrope_section is \(2, 3, 2\)"),
        ("Lance_3B/llm_config.json", {"rope_scaling": {}}, "lacks 'mrope_section'"),
        ("Lance_3B/llm_config.json", {"rope_scaling": None}, "NoneType"),
        ("Lance_3B/llm_config.json", {"hidden_act": "gelu"}, "hidden_act 'gelu'; Lance uses 'silu'"),
        ("Lance_3B/llm_config.json", {"vision_start_token_id": 3}, "vision_start_token_id is 3"),
        ("Lance_3B/llm_config.json", {"num_hidden_layers": 2}, "surplus"),
        ("Lance_3B/llm_config.json", {"vocab_size": 400}, "tokens? .*none of a vocabulary|embedding table|token"),
        ("Qwen2.5-VL-ViT/config.json", {"window_size": 50}, "window_size is 50"),
        ("Qwen2.5-VL-ViT/config.json", {"fullatt_block_indexes": ["a"]}, "fullatt_block_indexes"),
        ("Qwen2.5-VL-ViT/config.json", {"fullatt_block_indexes": 3}, "not iterable|fullatt"),
        ("Qwen2.5-VL-ViT/config.json", {"depth": 2}, "surplus"),
        ("Qwen2.5-VL-ViT/config.json", {"num_heads": 3}, "heads"),
        ("Qwen2.5-VL-ViT/config.json", {"patch_size": "14"}, "patch_size"),
    ],
)
def test_configurations_that_lie(folder, file, changes, message):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        bagel_opt.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "conv2.weight",
        "encoder.conv1.weight",
        "decoder.upsamples.0.upsamples.2.time_conv.weight",
        "encoder.middle.1.norm.gamma",
    ],
)
def test_an_autoencoder_that_lacks_a_tensor(folder, name):
    path = folder / lance.VAE_FILE
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=re.escape(name.rpartition(".")[0]) + "|changes the number of frames"
    ) as caught:
        bagel_opt.load(folder)
    assert "\n" not in str(caught.value)


def test_the_head_is_its_own_whatever_the_configuration_says(folder):
    path = folder / "Lance_3B" / lance.SIZES
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    answers(folder, next(case for case in cases() if case.name == "x2t_image"))


def test_recommended_options_count(folder):
    (folder / "Lance_3B" / "config.json").write_text(json.dumps({"generation": {"num_timesteps": 3}}))
    model, events = bagel_opt.load(folder, device="cpu"), []
    model.generate("a", height=32, width=32, seed=0, on_step=events.append)
    assert len(events) == 3
    assert model.defaults.timestep_shift == 3.5
