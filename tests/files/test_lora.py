"""Adapters that peft itself made, merged as peft merges them; and those that are for something else."""

import json
import shutil

import numpy as np
import pytest
import torch
from adapters import FILE, PEFT, adapted
from bundles import few_programs, traced_here
from safetensors.torch import load_file, save_file
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.errors import CheckpointError
from bagel_opt.export import export
from bagel_opt.files.adapters import with_factors
from bagel_opt.files.checkpoint import Checkpoint, published_tensors


@pytest.fixture
def adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def merged(lora, dtype=torch.float32, base=CHECKPOINT):
    """Published weights after ours."""
    return dict(published_tensors(Checkpoint(base, lora=lora).load(torch.device("cpu"), dtype)))


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"rank_pattern": {"q_proj_moe_gen": 2}, "alpha_pattern": {"q_proj_moe_gen": 32}}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"use_rslora": True, "targets": ["q_proj", "v_proj", "mlp.down_proj"]}),
        (torch.float32, {"targets": ["self_attn.o_proj_moe_gen", "vae2llm", "lm_head", "fc1"]}),
    ],
    ids=str,
)
def test_merged_as_peft_merges_it(tmp_path, dtype, settings):
    """To the bit: the delta is not rounded first."""
    model = adapted(dtype, **settings)
    model.save_pretrained(tmp_path / "adapter")
    base = shutil.copytree(CHECKPOINT, tmp_path / "base")
    every = {name: tensor.to(dtype) for name, tensor in load_file(base / "ema.safetensors").items()}
    save_file(every, base / "ema.safetensors")
    got, changed = merged(tmp_path / "adapter", dtype, base), 0
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.equal(got[name], tensor), name
        changed += not torch.equal(tensor, every[name])
    assert changed == len(Checkpoint(base, lora=tmp_path / "adapter").adapters[0].pairs) > 3


def test_merged_answers_as_peft_applies_it(adapter):
    """peft's own product, with the adapter apart, and ours with it merged."""
    name = "language_model.model.layers.1.mlp_moe_gen.down_proj"
    product, x = adapted().base_model.model.get_submodule(name), torch.randn(5, 160)
    ours = merged([adapter])[f"{name}.weight"]
    assert torch.allclose(product(x), x @ ours.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(product.base_layer(x), x @ ours.T, rtol=1e-2, atol=1e-2)


def rewrite(adapter, change):
    """Other names for the tensors of an adapter."""
    save_file({change(name): tensor for name, tensor in load_file(adapter / FILE).items()}, adapter / FILE)


LANGUAGE = "language_model.model."


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix(PEFT),
        lambda name: name.replace(LANGUAGE, "model."),  # of the language model alone
        lambda name: name.replace(PEFT + LANGUAGE, PEFT),  # rooted at its layers
        lambda name: name.replace(PEFT + LANGUAGE, ""),
        lambda name: name.replace(PEFT, PEFT + "bagel."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_prefixes(adapter, change):
    want = merged(adapter)
    rewrite(adapter, change)
    got = merged(adapter / FILE)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_several_with_factors(tmp_path):
    deltas, plain = [], merged(())
    for seed in (1, 2):
        adapted(seed=seed).save_pretrained(tmp_path / str(seed))
        one = merged([tmp_path / str(seed)])
        deltas.append({name: one[name] - plain[name] for name in plain})
    got = merged([(tmp_path / "1", 0.5), (tmp_path / "2", -2)])
    for name, tensor in plain.items():
        assert torch.allclose(got[name], tensor + 0.5 * deltas[0][name] - 2 * deltas[1][name], atol=1e-5), name
    off = merged([(tmp_path / "1", 0)])
    assert all(torch.equal(off[name], tensor) for name, tensor in plain.items())


@pytest.mark.second
def test_in_other_runtimes(adapter, tmp_path):
    """An export of a model with an adapter is the model with the adapter."""
    options = {"seed": 1, "num_timesteps": 4, "height": 64, "width": 64}

    def velocities(model):
        seen = []
        model.run(["a red circle"], on_step=lambda event: seen.append(np.asarray(event.v_t)), **options)
        return np.stack(seen)

    eager = velocities(bagel_opt.load(CHECKPOINT, lora=adapter, device="cpu"))
    assert np.abs(eager - velocities(bagel_opt.load(CHECKPOINT, device="cpu"))).max() > 0.1
    profile = Profile("tiny", rows=3, slots=160, text=16, patches=16, latents=16)
    with few_programs("text", "generate", "generate_row", "step", "vae_decode"), traced_here():
        bundle = export(CHECKPOINT, tmp_path / "bundle", profile, lora=[(adapter, 1.0)])
        ours = velocities(bagel_opt.load(bundle))
    assert np.linalg.norm(ours - eager) / np.linalg.norm(eager) < 1e-4


# ---- what is refused


def fails(adapter, *words, kind=CheckpointError):
    with pytest.raises(kind) as refused:
        Checkpoint(CHECKPOINT, lora=[adapter])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_an_adapter_for_another_model(adapter):
    rewrite(adapter, lambda name: name.replace(LANGUAGE + "layers.2", "transformer.single_transformer_blocks.2"))
    fails(adapter, "for another model", "single_transformer_blocks.2")
    adapter2 = adapter.parent / "two"
    adapted().save_pretrained(adapter2)
    rewrite(adapter2, lambda name: name.replace("q_proj_moe_gen", "q_proj_gen"))
    fails(adapter2, "q_proj_gen", "nearest", "q_proj_moe_gen.weight")


def test_another_rank_in_some_layers(adapter):
    every = load_file(adapter / FILE)
    name = next(name for name in every if "lora_A" in name)
    save_file(every | {name: every[name][:2].contiguous()}, adapter / FILE)
    fails(adapter, "rank 4", "factors of (2, ")


def test_half_of_a_pair(adapter):
    every = load_file(adapter / FILE)
    del every[next(name for name in every if "lora_B" in name)]
    save_file(every, adapter / FILE)
    fails(adapter, "has not one lora_A and one lora_B")


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("use_dora", True, "use_dora is True"),
        ("peft_type", "LOHA", "peft_type is 'LOHA'"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("bias", "all", "bias is 'all'"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("r", 0, "r is 0"),
        ("lora_alpha", None, "lora_alpha is None"),
        ("lora_alpha", "8", "lora_alpha is '8'"),
    ],
)
def test_other_kinds_of_adapters(adapter, field, value, word):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {field: value}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    fails(adapter, "adapter_config.json", word)


def test_dora_by_its_tensors(adapter):
    every = load_file(adapter / FILE)
    save_file({**every, PEFT + LANGUAGE + "layers.0.x.lora_magnitude_vector": torch.ones(4)}, adapter / FILE)
    fails(adapter, "lora_magnitude_vector", "no plain LoRA")


def test_files_that_are_missing_or_no_json(adapter, tmp_path):
    (adapter / "adapter_config.json").write_text("{")
    fails(adapter, "adapter_config.json is not valid JSON")
    (adapter / "adapter_config.json").unlink()
    fails(adapter, "adapter_config.json is missing", kind=FileNotFoundError)
    fails(tmp_path, "has no adapter_model.safetensors", kind=FileNotFoundError)
    fails(tmp_path / "nowhere", "nowhere", "the folder that peft wrote", kind=FileNotFoundError)


@pytest.mark.parametrize("lora", [[1], [("a", "b")], [("a", True)], [("a", 1, 2)], [("a", float("nan"))], [("a", 1e9)]])
def test_what_is_no_list_of_adapters(lora):
    with pytest.raises(ValueError, match="lora has"):
        with_factors(lora)


@pytest.mark.parametrize("lora", [3, {"a": "b"}, {"a"}, True])
def test_what_is_no_list(lora):
    with pytest.raises(
        ValueError, match=r"^lora is .*; allowed: a file or a folder, or a list of these and of \(file, factor\)"
    ):
        with_factors(lora)
