"""Reading checkpoints: every layout gives the same model, and what is wrong is named in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from random_checkpoint import count, make, sizes_for, write_tokenizer
from safetensors.torch import load_file, save_file
from support import CHECKPOINT, ROOT, cases

import bagel_opt
from bagel_opt import CheckpointError, images
from bagel_opt.files.checkpoint import Checkpoint

SMALL = {"heads": 4, "head_dim": 8, "mlp": 48, "vit_hidden": 16, "vit_side": 4, "latent_side": 4}
LAYER = "language_model.model.layers.1."
VIT = "vit_model.vision_model."


def read(folder, dtype=torch.float32):
    return Checkpoint(folder).load(torch.device("cpu"), dtype)


def weights(folder):
    return dict(read(folder).named_parameters())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def published(folder):
    tensors = load_file(folder / "ema.safetensors")
    return tensors | {f"vae.{name}": tensor for name, tensor in load_file(folder / "ae.safetensors").items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture
def folder(small, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(small, tmp_path / "checkpoint"))


# ---- what is read


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
    assert asked == [("owner/name",)]


# ---- what is wrong


def fails(folder, kind, *words):
    with pytest.raises(kind) as caught:
        read(folder)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message


def edit_json(folder, file, **fields):
    path = folder / file
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def edit_weights(folder, **changes):
    tensors = load_file(folder / "ema.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "ema.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("llm2vae.bias", None, ["1 tensor missing", "llm2vae.bias"]),
        (f"{LAYER}self_attn.k_proj_moe_gen.bias", None, ["missing", "self_attn.k_proj_moe_gen.bias"]),
        ("latent_pos_embed.pos_embed", None, ["missing", "latent_pos_embed.pos_embed"]),
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
    fails(folder, CheckpointError, str(folder) if "tensors" in words[0] else "", *words)


def test_rows_on_the_wrong_side_of_a_stack(folder):
    """The sum of the rows is right, the tensors are not."""
    gate, up = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
    edit_weights(folder, **{gate: torch.zeros(40, 32), up: torch.zeros(56, 32)})
    fails(folder, CheckpointError, f"{gate} is [40, 32], not [48, 32]", f"{up} is [56, 32], not [48, 32]")


def test_without_the_generation_expert(folder):
    gone = [name for name in published(folder) if "_moe_gen" in name]
    edit_weights(folder, **dict.fromkeys(gone))
    fails(folder, CheckpointError, f"{len(gone)} tensors missing", "_moe_gen", f"and {len(gone) - 8} more")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
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
    "file", ["tokenizer.json", "config.json", "ae.safetensors", "model-00002-of-00003.safetensors", "llm_config.json"]
)
def test_missing_file(tmp_path, file):
    folder = make(tmp_path, **SMALL, shards=3)
    edit_json(folder, "config.json", llm_config=None)
    (folder / file).unlink()
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


# ---- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make(tmp_path_factory.mktemp("large"), dtype=torch.bfloat16, **sizes_for(150_000_000))


PEAK = """
import sys, torch
from bagel_opt.files.checkpoint import Checkpoint

def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def load(folder):
    return Checkpoint(folder).load(torch.device("cpu"), getattr(torch, sys.argv[3]))

load(sys.argv[1])  # what libraries take once
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
except OSError:
    pass
before = memory("VmRSS")
model = load(sys.argv[2])
print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_while_loading(small, large, dtype):
    """The weights once, and little of the bfloat16 file at a time."""
    command = [sys.executable, "-c", PEAK, small, large, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.2


@pytest.mark.parametrize("parameters", [50e6, 300e6, 2e9, 14e9])
def test_sizes_for_a_number_of_parameters(parameters):
    sizes = sizes_for(int(parameters))
    assert count(**sizes) == pytest.approx(parameters, rel=0.02)
    assert sizes["heads"] == 7 * sizes["kv_heads"]
