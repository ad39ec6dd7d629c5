"""`bench --preset` without its GPU: parts of it, with a model in small on the CPU."""

from types import SimpleNamespace

import pytest
import torch

import bagel_opt
from bagel_opt import Profile
from bagel_opt.bench import contenders, full_size_gpus, full_size_memory, full_size_tables
from bagel_opt.runtime.torch_setup import prepare

CPU = torch.device("cpu")
KINDS = {"16 bits": {}, "int8": {"und": "int8"}}
PROFILES = {
    "bagel-1024": Profile("small", rows=2, slots=384, text=64, patches=16, latents=64),
    "bagel-edit-1024": Profile("edits", rows=3, slots=640, text=64, patches=64, latents=64),
}


@pytest.fixture(scope="module")
def model():
    return bagel_opt.load(device="cpu")


@pytest.mark.parametrize("kinds", [{}, {"gen": "int8", "head": "int4"}], ids=str)
def test_random_weights_are_the_same_wherever_they_lie(model, kinds):
    asked = []
    made = contenders.random_model(model.config, CPU, kinds)
    other = contenders.random_model(model.config, CPU, kinds, lambda name: asked.append(name) or True)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))
    assert "llm.layers.3.gen.o." in asked
    plain = contenders.random_model(model.config, CPU)
    assert torch.equal(plain.llm.layers[3].und.o.weight, made.llm.layers[3].und.o.weight)
    assert plain.llm.norm_und.weight.unique().tolist() == [1.0]


@pytest.fixture
def gpu(monkeypatch):
    """What the CPU is taken for. -> the shares of its memory that are allowed, one after another"""
    small = {
        "DEVICE": CPU,
        "RESERVE": 0,
        "DEFAULTS": {},
        "SIDE": 64,
        "LATENTS": 16,
        "STEPS": 2,
        "TIMEPOINTS": 3,
        "EDIT_POINTS": 3,
    }
    for name, value in {**small, "LINK_BYTES": 1000}.items():
        monkeypatch.setattr(full_size_memory, name, value)
    monkeypatch.setattr(full_size_memory, "load_profile", PROFILES.get)
    monkeypatch.setattr(full_size_memory, "prepare", lambda model, compiled, plan: prepare(model, False, plan))
    monkeypatch.setattr(contenders, "DTYPE", torch.float32)  # convolutions in bfloat16 take minutes on some CPUs
    monkeypatch.setattr(contenders, "TOKENS", 3)
    shares = []
    about = {
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
        **dict.fromkeys(("memory_reserved", "max_memory_allocated"), lambda *_: 0),
        "mem_get_info": lambda *_: (99 * 10**7, 10**9),
        "get_device_properties": lambda _: SimpleNamespace(total_memory=10**9),
        "set_per_process_memory_fraction": shares.append,
    }
    for name, value in about.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return shares


@pytest.mark.second
@pytest.mark.usefixtures("quick_ranks")
def test_several_gpus(model, monkeypatch):
    """Processes on the CPU: each way is a model that answers, with the same weights, and its gathers are timed."""
    monkeypatch.setattr(full_size_gpus, "DEVICE", CPU)
    kinds = {"16 bits": {}, "int8": {"und": "int8"}}
    alone = full_size_gpus.random_loaded(CPU, model.config, {}).chat("a", max_think_tokens=3)
    names = []
    for name, ours in full_size_gpus.several(model.config, 2, kinds, names.append):
        runtime = ours.model.runtime
        assert runtime.active()["device"].endswith(f"x 2, parallel {name.split(', ')[1]}")
        assert (runtime.active()["quantization"] == "none") == ("int8" not in name)
        if "int8" not in name:
            assert ours.model.chat("a", max_think_tokens=3) == alone
        found = full_size_gpus.gathers(2, ours)
        assert len(found) == 4
        assert all(value > 0 for (value,) in found.values())
    assert names == ["2 GPUs, auto", "2 GPUs, guidance", "2 GPUs, sequence", "2 GPUs, auto, int8"]
    with pytest.raises(RuntimeError, match="closed"):  # before the next is made
        ours.model.chat("a", max_think_tokens=3)


@pytest.mark.second
def test_caps_of_memory(gpu, model):
    plans = full_size_memory.planned(model.config, KINDS, ["400MB", "20MB"])
    streamed = {at: plan["bagel-1024"].step_bytes for at, plan in plans.items()}
    del plans["int8", "20MB"]["bagel-edit-1024"]  # as where an edit has no room
    assert streamed["16 bits", "20MB"]
    assert not streamed["16 bits", "400MB"]
    found = [*full_size_memory.under_caps(model.config, model.tokenizer, KINDS, plans, lambda what: None)]
    assert [(row["weights"], row["cap"]) for row in found] == [
        (name, cap) for name in KINDS for cap in ("none", "400MB", "20MB")
    ]
    for row in found:
        if row["cap"] != "none":
            assert row["same pictures"]
            assert bool(row["link's floor of a step, ms"]) == bool(streamed[row["weights"], row["cap"]])
    assert ["edit, whole, s" in row for row in found] == [True] * 5 + [False]
    assert gpu == pytest.approx([0.39, 1.0, 0.01, 1.0] * 2)  # less what is taken outside of torch
    results = {"device": "", "versions": {"torch": ""}, "figures": {"ours": {"token, ms": [1.0]}}, "scaling": []}
    *_, table = full_size_tables.tables({**results, "bytes per token": 1, "memory": found})
    assert [column.header for column in table.columns][:3] == ["weights", "cap", "step, ms"]
    assert table.columns[-1]._cells == ["", "yes", "yes"] * 2
