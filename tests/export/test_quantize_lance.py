"""Lance in 8 and 4 bits: written once, read as it is."""

import json
import shutil

import pytest
import torch
from checkpoints import edit_json
from lance_cases import CHECKPOINT, cases
from safetensors.torch import load_file, save_file

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.errors import CheckpointError
from bagel_opt.export.quantize import quantize
from bagel_opt.files.checkpoint import Checkpoint

TABLE = {"gen": "fp8", "und": "int8", "vit": "int4", "head": "int8", "embeddings": "int4"}


@pytest.fixture
def written(tmp_path):
    return quantize(CHECKPOINT, tmp_path / "quantized", TABLE)


def parameters(model):
    return {
        name: (p.dtype, p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, p in model.runtime.model.named_parameters()
    }


@pytest.mark.parametrize("quantization", ["int8", "int4", TABLE], ids=str)
def test_the_same_bits_as_when_it_is_quantised_at_loading(tmp_path, quantization):
    out = quantize(CHECKPOINT, tmp_path / "quantized", quantization)
    want = bagel_opt.load(CHECKPOINT, device="cpu", quantization=quantization)
    for place in (out, out / "Lance_3B"):
        model = bagel_opt.load(place, device="cpu")
        assert parameters(model) == parameters(want)
        assert model.config == want.config
    case = next(case for case in cases() if case.name == "video_edit")
    [frames], [others] = (m.run(case.inputs, **case.options) for m in (model, want))
    assert [frame.tobytes() for frame in frames] == [other.tobytes() for other in others]


def test_what_is_written(written):
    names = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    inner = {f"Lance_3B/{name}" for name in ("config.json", "llm_config.json", "model.safetensors", "tokenizer.json")}
    assert names == {"Wan2.2_VAE.safetensors", "Qwen2.5-VL-ViT/config.json", *inner}
    tensors, plain = (
        load_file(written / "Lance_3B/model.safetensors"),
        load_file(CHECKPOINT / "Lance_3B/model.safetensors"),
    )
    name = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"
    assert (tensors[name].dtype, tensors[name].shape) == (torch.float8_e4m3fn, plain[name].shape)
    assert tensors[name.replace(".weight", ".weight_scale")].shape == plain[name].shape[:1]
    assert tensors["vit_model.blocks.0.attn.qkv.weight"].dtype == torch.uint8
    assert torch.equal(tensors["language_model.model.norm.weight"], plain["language_model.model.norm.weight"])
    vae, before = (load_file(place / "Wan2.2_VAE.safetensors") for place in (written, CHECKPOINT))
    assert all(torch.equal(vae[key], before[key]) for key in before)


def test_what_it_was_trained_for_and_recommends_goes_along(tmp_path):
    """Where it lies alone, no folder beside it says that any more."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "both")
    shutil.copytree(folder / "Lance_3B", folder / "Lance_3B_Video")
    (folder / "Lance_3B_Video/config.json").write_text(json.dumps({"generation": {"num_timesteps": 7}}))
    out = quantize(folder / "Lance_3B_Video", tmp_path / "quantized", "int8")
    config = Checkpoint(out).config
    assert Checkpoint(out).folder.name == "Lance_3B_Video"
    assert config.draws == ("video",)
    assert config.generation["num_timesteps"] == 7
    assert config == Checkpoint(folder / "Lance_3B_Video").config
    with pytest.raises(ValueError, match="output='image': this model was trained to draw videos"):
        bagel_opt.load(out, device="cpu").generate("a")
    for bad in ("video", [], ["film"], [{}]):
        edit_json(out, "Lance_3B_Video/llm_config.json", draws=bad)
        with pytest.raises(CheckpointError, match=r"draws is .*; it must hold image or video, or both"):
            Checkpoint(out)


def test_what_does_not_fit_any_more(written, tmp_path, capsys):
    assert main(["quantize", str(written), "--quantization", "int8", "--out", str(tmp_path / "again")]) == 1
    assert "is quantised already; quantise the checkpoint that it was made from" in capsys.readouterr().err
    weights = tmp_path / "more.safetensors"
    save_file({"language_model.model.norm.weight": torch.ones(64)}, weights)
    with pytest.raises(CheckpointError, match="is quantised, and weights go into plain weights"):
        Checkpoint(written, weights=weights)
    with pytest.raises(CheckpointError, match=r"is quantised, .* which quantization=.* cannot change"):
        bagel_opt.load(written, device="cpu", quantization="fp8")
    edit_json(written, "Lance_3B/config.json", quantization_config={"quant_method": "bagel_opt", "version": 9})
    with pytest.raises(CheckpointError, match="which this bagel_opt does not know; upgrade it"):
        Checkpoint(written)


def test_a_scale_that_is_missing(written):
    path = written / "Lance_3B/model.safetensors"
    tensors = load_file(path)
    del tensors["vit_model.blocks.0.attn.qkv.weight_scale"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"1 tensor missing: vit_model\.blocks\.0\.attn\.qkv\.weight_scale"):
        Checkpoint(written)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "q"
    assert main(["quantize", str(CHECKPOINT), "--quantization", "gen=int8", "--out", str(out)]) == 0
    asked = [
        "generate",
        "a",
        "--height",
        "32",
        "--width",
        "32",
        "--num-timesteps",
        "2",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    for name, place in (("a.png", [str(out)]), ("b.png", [str(CHECKPOINT), "--quantization", "gen=int8"])):
        assert main([*asked, "--checkpoint", *place, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main(["inspect", str(out)]) == 0
    assert "F32, I8" in capsys.readouterr().out
