"""Reading checkpoints: every layout gives the same model."""

import json

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from checkpoints import LAYER, SMALL, VIT, assert_same, edit_json, published, read, weights
from random_checkpoint import count, make, sizes_for, write_tokenizer
from safetensors.torch import load_file
from support import CHECKPOINT, cases

from bagel_opt import images
from bagel_opt.files.checkpoint import Checkpoint


def test_golden_checkpoint():
    checkpoint = Checkpoint(CHECKPOINT)
    c = checkpoint.config
    assert (c.llm.hidden_size, c.llm.num_hidden_layers, c.llm.num_key_value_heads, c.llm.head_dim) == (64, 3, 2, 16)
    assert (c.vit.num_hidden_layers, c.vit.num_positions, c.vit_side) == (2, 64, 8)  # one layer fewer than in the file
    assert (c.latent_side, c.token_pixels, c.default_size) == (8, 16, 128)
    assert json.loads((CHECKPOINT / "config.json").read_text())["max_latent_size"] == 4  # stale
    assert vars(c.special) == json.loads((CHECKPOINT.parent / "index.json").read_text())["special_token_ids"]
    calls = []
    model = checkpoint.load(torch.device("cpu"), torch.float32, lambda *numbers: calls.append(numbers))
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == sum(t.numel() for t in published(CHECKPOINT).values())
    assert calls == [(i + 1, len(parameters)) for i in range(len(parameters))]
    assert not any(p.requires_grad for p in parameters)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_tokenizer(case):
    tokenizer = Checkpoint(CHECKPOINT).tokenizer
    for item in case.data["input"]:
        if "text" in item:
            assert list(tokenizer.block(item["text"])) == item["token_ids"]
            assert tokenizer.decode(item["token_ids"]) == item["text"]


def test_every_tensor_lands_in_its_rows(small):
    """Also those that one product of ours stacks: queries, keys and values, and the MLP's two halves."""
    have, model, c = published(small), read(small), Checkpoint(small).config.llm
    heads = [c.num_attention_heads * c.head_dim, *2 * [c.num_key_value_heads * c.head_dim]]
    for expert, gen in (("und", ""), ("gen", "_moe_gen")):
        part = getattr(model.llm.layers[1], expert)
        for kind in ("weight", "bias"):
            parts = getattr(part.qkv, kind).split(heads)
            for name, tensor in zip("qkv", parts, strict=True):
                assert torch.equal(tensor, have[f"{LAYER}self_attn.{name}_proj{gen}.{kind}"])
        for name, tensor in zip(("gate", "up"), part.gate_up.weight.chunk(2), strict=True):
            assert torch.equal(tensor, have[f"{LAYER}mlp{gen}.{name}_proj.weight"])
        assert torch.equal(part.q_norm.weight, have[f"{LAYER}self_attn.q_norm{gen}.weight"])
        assert torch.equal(part.norm2.weight, have[f"{LAYER}post_attention_layernorm{gen}.weight"])
    for name, tensor in zip("qkv", model.vit_encoder.layers[1].qkv.weight.chunk(3), strict=True):
        assert torch.equal(tensor, have[f"{VIT}encoder.layers.1.self_attn.{name}_proj.weight"])
    assert torch.equal(model.llm.norm_gen.weight, have["language_model.model.norm_moe_gen.weight"])
    assert torch.equal(model.latent_out.weight, have["llm2vae.weight"])
    assert torch.equal(model.vae.decoder.mid.attn_1.q.weight, have["vae.decoder.mid.attn_1.q.weight"])


@pytest.mark.parametrize("change", [{"shards": 3}, {"conv_patch": True}, {"leftovers": True}], ids=str)
def test_layouts_give_the_same_model(small, tmp_path, change):
    made = make(tmp_path, **SMALL, **change)
    assert (made / "ema.safetensors").exists() != ("shards" in change)
    assert_same(weights(made), weights(small))


def test_convolution_over_patches(tmp_path):
    made = make(tmp_path, **SMALL, conv_patch=True)
    have, picture_CHW = load_file(made / "ema.safetensors"), torch.randn(3, 28, 42)
    kernel, bias = (have[f"{VIT}embeddings.patch_embedding.{kind}"] for kind in ("weight", "bias"))
    assert kernel.ndim == 4
    want_PC = F.conv2d(picture_CHW[None], kernel, bias, stride=14)[0].flatten(1).T
    got_PC = read(made).vit_encoder.patch(torch.from_numpy(images.tokens(picture_CHW.numpy(), 14)))
    assert torch.allclose(got_PC, want_PC, atol=1e-5)


def test_one_file_under_either_name(small, folder):
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    assert_same(weights(folder), weights(small))


@pytest.mark.parametrize("shards", [["nowhere.safetensors"], [], ["ema.safetensors"], ["ema.safetensors", "nowhere"]])
def test_stale_index_beside_the_whole_model(small, folder, shards):
    text = json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}})
    (folder / "model.safetensors.index.json").write_text(text)
    assert_same(weights(folder), weights(small))


@pytest.mark.parametrize("size", [1, 2, 100])
def test_stale_max_latent_size(folder, size):
    edit_json(folder, "config.json", max_latent_size=size)
    assert Checkpoint(folder).config.latent_side == 4


def test_configuration_in_one_file(small, folder):
    for name in ("llm_config.json", "vit_config.json"):
        (folder / name).unlink()
    assert Checkpoint(folder).config == Checkpoint(small).config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(small, tmp_path, dtype):
    """A file of one dtype into a model of another: each number is rounded once."""
    half = make(tmp_path, **SMALL, dtype=dtype)
    want = {name: tensor.to(dtype) for name, tensor in weights(small).items()}
    assert_same(dict(read(half, dtype).named_parameters()), want)
    assert_same(dict(read(small, dtype).named_parameters()), want)
    assert_same(weights(half), {name: tensor.float() for name, tensor in want.items()})


def test_tokenizer_without_special_tokens(folder):
    """Missing ones follow the last id, as in the official code."""
    write_tokenizer(folder / "tokenizer.json", specials=("<|endoftext|>",))
    first = Checkpoint(folder).tokenizer
    assert list(vars(first.special).values()) == [269, 270, 271, 272]


def test_repo_id(small, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(a) or str(small))
    assert Checkpoint("owner/name").folder == small
    assert asked == [("owner/name",)] * 2


def test_fields_that_the_official_code_ignores(folder):
    text = "a red circle and a blue square"
    want, ids = weights(folder), Checkpoint(folder).tokenizer.encode(text)
    edit_json(folder, "llm_config.json", tie_word_embeddings=True)
    edit_json(
        folder,
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
    )
    assert_same(weights(folder), want)
    assert Checkpoint(folder).tokenizer.encode(text) == ids


@pytest.mark.parametrize("parameters", [50e6, 300e6, 2e9, 14e9])
def test_sizes_for_a_number_of_parameters(parameters):
    sizes = sizes_for(int(parameters))
    assert count(**sizes) == pytest.approx(parameters, rel=0.02)
    assert sizes["heads"] == 7 * sizes["kv_heads"]
