"""What is wrong with a checkpoint is named in one line."""

import huggingface_hub
import pytest
import torch
from checkpoints import LAYER, SMALL, VIT, edit_json, edit_weights, published, read
from random_checkpoint import make

import bagel_opt
from bagel_opt import CheckpointError
from bagel_opt.cli.commands import main
from bagel_opt.export.quantize import quantize


def fails(folder, kind, *words):
    with pytest.raises(kind) as caught:
        read(folder)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("llm2vae.bias", None, ["1 tensor missing", "llm2vae.bias"]),
        (f"{LAYER}self_attn.k_proj_moe_gen.bias", None, ["missing", "self_attn.k_proj_moe_gen.bias"]),
        ("extra.weight", (3,), ["1 tensor surplus", "extra.weight"]),
        (f"{VIT}encoder.layers.3.layer_norm1.bias", (16,), ["surplus", "layers.3.layer_norm1.bias"]),
        ("vae2llm.weight", (32, 63), ["1 tensor mis-shaped", "vae2llm.weight is [32, 63], not [32, 64]"]),
        (f"{LAYER}input_layernorm.weight", (), ["mis-shaped", "input_layernorm.weight is [], not [32]"]),
        (f"{LAYER}self_attn.q_proj.weight", (31, 32), ["self_attn.q_proj.weight is [31, 32], not [32, 32]"]),
        (f"{LAYER}self_attn.k_proj.weight", (), ["self_attn.k_proj.weight is [], not [16, 32]"]),
        (f"{LAYER}mlp.up_proj.weight", (48, 31), ["mlp.up_proj.weight is [48, 31], not [48, 32]"]),
        (f"{VIT}embeddings.patch_embedding.weight", (16, 3, 7, 7), ["is [16, 3, 7, 7], not [16, 3, 14, 14]"]),
        ("latent_pos_embed.pos_embed", (15, 32), ["latent_pos_embed.pos_embed has 15 rows"]),
        ("vit_pos_embed.pos_embed", (), ["vit_pos_embed.pos_embed has 0 rows"]),
    ],
)
def test_wrong_tensor(folder, name, shape, words):
    edit_weights(folder, **{name: None if shape is None else torch.zeros(shape)})
    fails(folder, CheckpointError, str(folder), *words)


def test_rows_on_the_wrong_side_of_a_stack(folder):
    """The sum of the rows is right, the tensors are not."""
    gate, up = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
    edit_weights(folder, **{gate: torch.zeros(40, 32), up: torch.zeros(56, 32)})
    fails(folder, CheckpointError, f"{gate} is [40, 32], not [48, 32]", f"{up} is [56, 32], not [48, 32]")


def test_numbers_that_are_none(folder, capsys):
    """One in all is enough; else each answer would fail, of a server that says it is ready."""
    bias = torch.zeros(64)
    bias[3] = float("nan")
    edit_weights(folder, **{"llm2vae.bias": bias})
    with pytest.raises(CheckpointError, match=r"safetensors: llm2vae\.bias holds NaN or infinities, .*another file$"):
        bagel_opt.load(folder, device="cpu")
    assert main(["serve", str(folder), "--profile", "tiny", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.count("holds NaN") == 1
    with pytest.raises(CheckpointError, match=r"llm2vae\.bias holds NaN"):
        quantize(folder, folder.parent / "out", "int8")
    assert not (folder.parent / "out").exists()


def test_without_the_generation_expert(folder):
    gone = [name for name in published(folder) if "_moe_gen" in name]
    edit_weights(folder, **dict.fromkeys(gone))
    fails(folder, CheckpointError, f"{len(gone)} tensors missing", "_moe_gen", f"and {len(gone) - 8} more")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e5m2])
def test_dtype_that_is_no_weight(folder, dtype):
    edit_weights(folder, **{"llm2vae.bias": torch.zeros(64, dtype=dtype)})
    fails(folder, CheckpointError, "llm2vae.bias is ")


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("cut", [0, 5, 8, 200, "header", "half", "last byte"])
def test_truncated_file(folder, file, cut):
    data = (folder / file).read_bytes()
    named = {"header": 8 + int.from_bytes(data[:8], "little"), "half": len(data) // 2, "last byte": len(data) - 1}
    (folder / file).write_bytes(data[: named.get(cut, cut)])
    fails(folder, CheckpointError, str(folder / file), "no complete safetensors file")


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "vit_config.json", "ae.safetensors", "model-00002-of-00003.safetensors", "llm_config.json"],
)
def test_missing_file(tmp_path, file):
    folder = make(tmp_path, **SMALL, shards=3)
    edit_json(folder, "config.json", llm_config=None, vit_config=None)
    (folder / file).unlink()
    (folder / "vocab.json").unlink(missing_ok=True)  # which would do with merges.txt
    fails(folder, FileNotFoundError, str(folder / file), "is missing")


def test_no_weights(folder):
    (folder / "ema.safetensors").unlink()
    fails(folder, FileNotFoundError, str(folder), "has no weights", "ema.safetensors")


def test_no_folder(tmp_path):
    fails(tmp_path / "nowhere", FileNotFoundError, str(tmp_path / "nowhere"), "is no folder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bagel_opt.load(tmp_path / "nowhere")


@pytest.mark.parametrize("error", [OSError("no network\nat all"), OSError()])
def test_no_download(monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    fails("owner/name", FileNotFoundError, "owner/name")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\xff"])
@pytest.mark.parametrize("file", ["config.json", "llm_config.json", "tokenizer.json", "preprocessor_config.json"])
def test_invalid_json(folder, file, text):
    (folder / file).write_bytes(text.encode("latin-1"))
    fails(folder, CheckpointError, str(folder / file))


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}']
)
def test_invalid_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    fails(folder, CheckpointError, "model.safetensors.index.json")


@pytest.mark.parametrize("value", [None, 0, -1, 64.0, "64", True, [64], 33])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("llm_config.json", "hidden_size"),
        ("llm_config.json", "num_key_value_heads"),
        ("vit_config.json", "num_attention_heads"),
        ("vit_config.json", "patch_size"),
    ],
)
def test_impossible_size(folder, file, field, value):
    edit_json(folder, file, **{field: value})
    fails(folder, CheckpointError, str(folder), "position_embedding" if (field, value) == ("patch_size", 33) else field)


@pytest.mark.parametrize(
    ("file", "fields", "word"),
    [
        ("llm_config.json", {"rope_theta": "1e6"}, "rope_theta"),
        ("llm_config.json", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("llm_config.json", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("config.json", {"vae_config": {"shift_factor": "x"}}, "shift_factor is 'x'"),
        ("llm_config.json", {"vocab_size": 270}, "token 272"),
        ("config.json", {"vae_config": [32]}, "vae_config"),
        ("config.json", {"vae_config": {"ch": 48}}, "ch is 48"),
        ("config.json", {"vae_config": {"ch_mult": []}}, "ch_mult"),
        ("config.json", {"vae_config": {"widths": 32}}, "widths"),
        ("config.json", {"latent_patch_size": "2"}, "latent_patch_size"),
        ("preprocessor_config.json", {"vae": {"max_size": 64}}, "min_size"),
    ],
)
def test_impossible_field(folder, file, fields, word):
    edit_json(folder, file, **fields)
    fails(folder, CheckpointError, str(folder), word)
