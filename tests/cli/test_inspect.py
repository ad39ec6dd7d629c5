"""`bagel-opt inspect` says of anything that people have what it is and what it lacks, and reads no weights for that."""

import json
import shlex
import shutil

import pytest
import torch
from forms import comfyui, dfloat11, tensors, veomni
from safetensors.torch import load_file, save_file
from support import CHECKPOINT

from bagel_opt.cli.inspect import describe, look
from bagel_opt.errors import CheckpointError
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.forms import BASE, PARTS, recognise

VAE, TOKENIZER = "the VAE (ae.safetensors)", "a tokenizer (tokenizer.json, or vocab.json and merges.txt)"
SIZES = ["its sizes (llm_config.json)", "its sizes (vit_config.json)"]
INSTEAD = "the same weights as *.safetensors, in 16 bits or in FP8 without scales"
OURS = "language_model.model.layers.0.self_attn.q_proj."


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch):
    for name in ("torch_weights.Reader.read", "dfloat11.Group.decode"):
        monkeypatch.setattr(f"bagel_opt.files.{name}", None)


def rows(source):
    """The first table."""
    first, *rest = look(str(source))
    names, values = ([*column.cells] for column in first.columns)
    return dict(zip(names, values, strict=True)), rest


def saved(path, held):
    save_file(held, path)
    return path


def base_without(folder, *names):
    shutil.copytree(CHECKPOINT, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def fine_tune(path):
    """RecA, ThinkMorph: a file, and over it nothing."""
    return saved(path / "model_bf16.safetensors", {n: t.bfloat16() for n, t in tensors().items()})


def eight_bits(path):
    return saved(path / "ema-FP8.safetensors", {n: t.to(torch.float8_e4m3fn) for n, t in tensors().items()})


def without_a_vae(path):
    return base_without(path / "folder", "ae.safetensors")


def generation_alone(path):
    return saved(path / "gen.safetensors", {n: t for n, t in tensors().items() if "_moe_gen" in n})


def comfyui_alone(path):
    return comfyui(path / "bagel 7b.safetensors")


def dfloat11_alone(path):
    folder = dfloat11(base_without(path / "folder"))
    for name in ("ae.safetensors", "tokenizer.json", "vocab.json"):
        (folder / name).unlink()
    return folder


def some_of_veomni(path):
    folder = veomni(path / "veomni")
    shutil.rmtree(folder / "bagel_text_encoder")
    shutil.rmtree(folder / "bagel_vae")
    return folder


def vae(path):
    return shutil.copy(CHECKPOINT / "ae.safetensors", path / "ae.safetensors")


@pytest.mark.parametrize(
    ("make", "what", "lacks"),
    [
        (fine_tune, "BAGEL", [VAE, TOKENIZER, *SIZES]),
        (eight_bits, "BAGEL in FP8 without scales", [VAE, TOKENIZER, *SIZES]),
        (without_a_vae, "BAGEL", [VAE]),
        (generation_alone, "BAGEL", [*list(PARTS)[:1], *list(PARTS)[2:], TOKENIZER, *SIZES]),
        (comfyui_alone, "BAGEL as one file for ComfyUI, BAGEL-7B-MoT", [VAE, TOKENIZER]),
        (dfloat11_alone, "BAGEL in 5 groups of DFloat11", [VAE, TOKENIZER]),
        (some_of_veomni, "BAGEL as VeOmni has it, 3 of its five folders", [VAE, TOKENIZER]),
        (vae, "BAGEL's VAE", [*list(PARTS)[:-1], TOKENIZER, *SIZES]),
    ],
)
def test_what_needs_a_base(tmp_path, make, what, lacks):
    """The command that is named does it: all that is lacking comes from the base."""
    place = make(tmp_path)
    table, rest = rows(place)
    assert (table["what it is"], table["what it lacks"].split("\n"), rest) == (what, lacks, [])
    command = shlex.split(table["to use it"])
    assert command[:3] == ["bagel-opt", "generate", "a red fox"]
    assert command[3:] == ["--checkpoint", BASE, "--weights", str(place)]
    Checkpoint(CHECKPOINT, weights=command[-1])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: base_without(path / "folder"), "BAGEL"),
        (lambda path: base_without(path / "folder") / "ema.safetensors", "BAGEL"),
        (lambda path: dfloat11(base_without(path / "folder")), "BAGEL in 5 groups of DFloat11"),
        (lambda path: veomni(path / "veomni"), "BAGEL as VeOmni has it, 5 of its five folders"),
        (
            lambda path: comfyui(base_without(path / "folder", "llm_config.json", "config.json") / "a.safetensors"),
            "BAGEL as one file for ComfyUI, BAGEL-7B-MoT",
        ),
    ],
    ids=range(5),
)
def test_what_is_whole(tmp_path, make, what):
    """Then come the tables on what it holds."""
    place = make(tmp_path)
    table, rest = rows(place)
    assert (table["what it is"], table["what it lacks"]) == (what, "nothing")
    assert shlex.split(table["to use it"])[3:] == ["--checkpoint", str(place)]
    assert [other.title for other in rest] == [other.title for other in describe(place)]


def test_tensors_are_counted(tmp_path):
    count = sum(tensor.numel() for tensor in tensors().values())
    assert rows(fine_tune(tmp_path))[0]["tensors"] == f"139 of {count:,} numbers, BF16"
    assert rows(CHECKPOINT)[0]["tensors"] == f"{139 + 176} of 1,458,611 numbers, F32"
    folder = dfloat11(base_without(tmp_path / "folder"))
    assert rows(folder)[0]["tensors"] == f"{139 + 176} of 1,458,611 numbers, BF16 and F32"


@pytest.mark.parametrize("place", ["", "adapter_model.safetensors"])
def test_adapters(tmp_path, place):
    held = {f"base_model.model.{OURS}lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
    save_file(held, tmp_path / "adapter_model.safetensors")
    table, _ = rows(tmp_path / place)
    assert table["what it is"] == "an adapter of peft, LoRA"
    assert table["what it lacks"] == "adapter_config.json, beside it\nthe model that it changes"
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 128, "base_model_name_or_path": "some/where"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    table, _ = rows(tmp_path / place)
    assert table["what it is"] == "an adapter of peft, LORA, rank 64, alpha 128"
    assert table["what it lacks"] == "the model that it changes, 'some/where'"
    assert shlex.split(table["to use it"])[3:] == ["--checkpoint", BASE, "--lora", str(tmp_path / place)]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        (f"{OURS}qweight", "integers of GPTQ, AWQ or AutoRound"),
        (f"{OURS}weight.absmax", "numbers of bitsandbytes"),
        (f"{OURS}weight_scale", "FP8 with scales"),
    ],
)
def test_layouts_that_are_not_read(tmp_path, name, word):
    path = saved(tmp_path / "model.safetensors", tensors() | {name: torch.zeros(4)})
    for place in (path, tmp_path):
        table, rest = rows(place)
        assert (table["what it is"], table["what it lacks"], rest) == (f"{path.name}: {word} ({name})", INSTEAD, [])
        assert "to use it" not in table


@pytest.mark.parametrize(("suffix", "word"), [("gguf", "GGUF"), ("bin", "pickled by PyTorch"), ("pth", "pickled by")])
def test_formats_that_are_not_read(tmp_path, suffix, word):
    (path := tmp_path / f"bagel-q4.{suffix}").write_bytes(b"GGUF")
    for place in (path, tmp_path):
        table, _ = rows(place)
        assert table["what it is"].startswith(f"bagel-q4.{suffix}: {word}")
        assert table["what it lacks"] == INSTEAD


def test_what_is_none_of_them(tmp_path):
    """One line each."""
    save_file({"transformer.x.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensors of BAGEL; it begins with transformer.x.weight"):
        recognise(tmp_path / "flux.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        recognise(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.txt is no complete safetensors file"):
        recognise(tmp_path / "text.txt")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        recognise(comfyui(tmp_path / "comfyui.safetensors", "{"))
    broken = base_without(tmp_path / "broken")
    save_file({n: t for n, t in tensors().items() if n != "llm2vae.bias"}, broken / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor missing: llm2vae.bias"):
        look(str(broken))
    index = json.dumps({"weight_map": dict.fromkeys(load_file(broken / "ema.safetensors"), "a.safetensors")})
    for text, word in ((index[:-9], "is not valid JSON"), (index, "a.safetensors is missing")):
        (broken / "model.safetensors.index.json").write_text(text)
        (broken / "ema.safetensors").unlink(missing_ok=True)
        with pytest.raises((CheckpointError, FileNotFoundError), match=word):
            recognise(broken)


def test_a_plan_for_a_card():
    """Before anything is loaded: what lies where, and how long a step would take over links of some speeds."""
    least = 10**9 + 1.8e7
    plain, (places, times) = describe(None), describe(None, memory=int(least), quantization="fp8")[-2:]
    assert len(describe(None, memory="2GB")) == len(plain) + 2
    cells = {row[0]: row[1:] for row in zip(*(column.cells for column in places.columns), strict=True)}
    assert places.title == "memory of 1.02 GB, profile demo"
    assert cells["together"][0] == "1.02 GB"
    assert "of 6 layers stream, by turns in two buffers of" in cells["generation expert"][2]
    assert cells["VAE, decoder"][0] == "0 B"
    assert cells["CUDA and its libraries, about"][0] == "1 GB"
    assert [*times.columns[1].cells] == ["12 GB/s", "25 GB/s", "55 GB/s"]
    steps = [float(cell.split()[0]) for cell in times.columns[2].cells]
    assert steps == sorted(steps, reverse=True)
    with pytest.raises(ValueError, match=r"memory='1GB': .* profile 'demo' it takes at least '1.02GB'"):
        describe(None, memory="1GB")
    with pytest.raises(ValueError, match="memory='much'; allowed are a size such as '12GB'"):
        describe(None, memory="much")


def test_a_plan_is_for_checkpoints(bundle):
    with pytest.raises(ValueError, match="is a bundle, which keeps all its weights on the GPU"):
        describe(bundle, memory="12GB")
