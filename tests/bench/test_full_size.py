"""`bench --preset` without its GPU: parts of it, with a model in small on the CPU."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lance_cases import GOLDEN, LanceCase
from lance_cases import loaded as lance

import bagel_opt
from bagel_opt import Profile
from bagel_opt.bench import contenders, full_size_gpus, full_size_lance, full_size_memory, full_size_tables
from bagel_opt.bench.full_size_lance_official import pad_token, sample
from bagel_opt.model.families import build
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling import lance as lance_planner
from bagel_opt.sampling.planning import make_plan

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


def test_random_weights_of_lance():
    made = contenders.random_model(lance().config, CPU)
    norms = {name: x for name, x in made.named_parameters() if ".gamma" in name or "norm" in name or "ln_q" in name}
    assert {"vae.decoder.head.0.gamma", "vit_encoder.merger.ln_q.weight", "llm.layers.0.gen.q_norm.weight"} <= {*norms}
    assert all(x.unique().tolist() == [1.0] for x in norms.values())
    others = [x.float() for name, x in made.named_parameters() if name not in norms]
    assert all(abs(x.std() - 0.02) < 0.01 for x in others if x.numel() > 100)


@pytest.fixture
def cuda(monkeypatch):
    """What the CPU is taken for. -> the shares of its memory that are allowed, one after another"""
    monkeypatch.setattr(contenders, "DTYPE", torch.float32)  # convolutions in bfloat16 take minutes on some CPUs
    monkeypatch.setattr(contenders, "TOKENS", 3)
    shares = []
    about = {
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
        **dict.fromkeys(("memory_reserved", "max_memory_reserved", "max_memory_allocated"), lambda *_: 0),
        "get_device_name": lambda *_: "no GPU",
        "mem_get_info": lambda *_: (99 * 10**7, 10**9),
        "get_device_properties": lambda _: SimpleNamespace(total_memory=10**9),
        "set_per_process_memory_fraction": shares.append,
    }
    for name, value in about.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return shares


@pytest.fixture
def gpu(cuda, monkeypatch):
    """The same, with works in small."""
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
    return cuda


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


def test_lance_in_small(cuda, monkeypatch):
    """All of `--preset lance` but the official code: each work's figures, where the card could at best be, and the tables."""
    works = {
        "64x96": {"output": "image", "height": 64, "width": 96},
        "9 frames": {"output": "video", "height": 48, "width": 80, "num_frames": 9},
    }
    for name, value in {"WORKS": works, "SIDE": 96, "PRODUCT": 64}.items():
        monkeypatch.setattr(full_size_lance, name, value)
    monkeypatch.setattr(lance_planner, "RESOLUTIONS", dict.fromkeys(("image", "video"), (96, 84)))
    saved, told = [], []
    results = full_size_lance.measured(
        lance().config, CPU, None, 2, told.append, lambda results: saved.append(json.dumps(results))
    )
    assert json.loads(saved[-1]) == results
    assert told[:4] == ["ours: 64x96", "ours: 9 frames", "ours: edit 96x96, 8 steps", "ours: tokens"]
    found = results["figures"]["ours"]
    assert {name: len(values) for name, values in found.items() if "first" not in name and "GB" not in name} == {
        **{f"{name}: {what}, s": 2 for name in works for what in ("denoising", "whole")},
        **{f"{name}: VAE decode, s": 3 for name in works},
        **{f"edit 96x96, 8 steps: {what}, s": 2 for what in ("denoising", "whole")},
        "token, ms": 6,
    }
    for name in works:
        denoising, whole = (min(found[f"{name}: {what}, s"]) for what in ("denoising", "whole"))
        assert 0 < denoising < whole
    assert results["velocity errors"]["ours"] < 1e-5
    assert [(row["rows"], row["latents"]) for row in results["scaling"]] == [(2, 24), (1, 24), (2, 45), (1, 45)]
    c, floors, speed = lance().config, results["floors"], results["product TFLOP/s"]
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112  # of a layer of one expert: q and o, k and v, the MLP
    attention = 2 * 64 * (24 + 2 + 128)
    wanted = (26 * 2 + 4) * c.llm.num_hidden_layers * 2 * 24 * (weights + attention)  # 26 of 30 steps are guided
    assert floors["64x96: denoising, s"] == pytest.approx(wanted / speed / 1e12)
    assert floors["9 frames: VAE decode, s"] > floors["64x96: VAE decode, s"] > 0
    shown, limits = full_size_tables.tables({**results, "figures": {"official": found, "ours": found}})
    headers = [column.header for column in shown.columns]
    assert headers == ["", "official", "ours", "ours, times", f"at {speed:.0f} TFLOP/s"]
    rows = {cells[0]: cells[1:] for cells in zip(*(column._cells for column in shown.columns), strict=True)}
    assert rows["64x96: denoising, s"][2:] == ("1.00", f"{floors['64x96: denoising, s']:.4g}")
    assert rows["token, ms"][1:] == (f"{statistics.median(found['token, ms']):.4g}", "1.00", "")
    assert limits.row_count == 5


def test_what_the_decoder_of_videos_computes():
    """Two for each product and sum, counted by hand for one frame: its convolutions, and the attention over 2 x 3 pixels."""
    canvas = full_size_lance.canvas_of(lance().config, {"height": 32, "width": 48})
    vae, total = build(lance().config).vae, []

    def count(module, inputs, output):
        total.append(2 * module.weight.numel() * output.numel() // module.weight.shape[0])

    for module in (vae.conv2, *(m for m in vae.decoder.modules() if hasattr(m, "kernel_size"))):
        module.register_forward_hook(count)
    vae.decode(torch.zeros(1, 48, 1, 2, 3))
    attention = 2 * 2 * 6 * 6 * vae.decoder.conv1.weight.shape[0]
    assert full_size_lance.decoding_tflop(canvas) * 1e12 == pytest.approx(sum(total) + attention)


@pytest.mark.parametrize("name", ["t2i", "t2v"])
def test_the_official_code_is_given_what_its_data_set_makes(name):
    """Against what golden cases keep of that."""
    case, model = LanceCase(GOLDEN / "cases" / name), lance()
    given = sample(make_plan(case.request(), model.config, model.tokenizer), model.config)
    ids = given["val_packed_text_ids"].clone()
    latents = given["val_packed_vae_token_indexes"]
    assert (ids[latents] == pad_token(model.config)).all()
    ids[latents] = json.loads((GOLDEN / "index.json").read_text())["special_token_ids"]["image_token_id"]
    assert torch.equal(ids, case.tensors["input.token_ids"])
    assert torch.equal(given["sample_modality"], case.tensors["input.modality"])
    assert [[*split] for split in zip(given["val_attn_modes"], given["val_split_lens"], strict=True)] == case.data[
        "splits"
    ]
    assert sorted([*given["val_packed_text_indexes"].tolist(), *latents.tolist()]) == [*range(len(ids))]
    frames, rows, columns = case.data["latent_thw"]
    assert given["video_grid_thw"].tolist() == [[[frames, 2 * rows, 2 * columns]]]
    assert given["video_sizes"] == [(4 * frames - 3, 16 * rows, 16 * columns)]


def test_words_are_tokens():
    """About as many as of the published tokenizer, and no caption is found before its place."""
    tokenizer = full_size_lance.words()
    assert len(tokenizer.encode(full_size_lance.PROMPT)) == 81
    assert len(tokenizer.encode("<|im_start|>system\n")) == 2
    assert "<unknown>" not in [tokenizer._tokenizer.id_to_token(i) for i in tokenizer.encode(lance_planner.EDIT)[:5]]
    assert max(vars(tokenizer.special).values()) < full_size_lance.PUBLISHED.llm.vocab_size


def test_latents_are_decoded_as_a_request_does_it():
    """In as many calls as there are latent frames, each with what the one before kept."""
    model, noise = lance(), torch.randn(3 * 2 * 3, 48)
    shape = {"height": 32, "width": 48, "num_frames": 9, "num_timesteps": 2, "seed": 0, "noise": noise}
    events = []
    frames = model.generate("a", output="video", on_step=events.append, **shape)
    last = events[-1]
    tokens = last.x_t - last.v_t * last.t  # to t = 0
    canvas = full_size_lance.canvas_of(model.config, shape)
    found = np.concatenate(contenders.Ours(model, several=False).decode(canvas.latents(tokens.numpy())))
    assert found.shape == (9, 32, 48, 3)
    assert np.abs(found.astype(int) - np.stack([np.asarray(frame) for frame in frames])).max() <= 1
