"""Lance: the official code's answers, and what must not change one."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lance_cases import CHECKPOINT, cases, loaded
from safetensors.torch import save_file
from support import Poisoned, examples, prefill, relative

import bagel_opt
from bagel_opt import Profile, ProfileError
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling.plan import fit_profile
from bagel_opt.sampling.planning import make_plan

ALL = cases()
named = {case.name: case for case in ALL}
CASES = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def model():
    return loaded()


@CASES
def test_answers(model, case):
    events, tokens = [], []
    outputs = model.run(case.inputs, on_step=events.append, on_token=tokens.append, **case.options)
    assert case.velocity_error(events) < 1e-4
    case.check_outputs(outputs)
    if "gen_text.0.tokens" in case.tensors:
        end = model.config.special.eos_token_id
        assert tokens == [token for token in case.tensors["gen_text.0.tokens"].tolist() if token != end]


@pytest.mark.parametrize("name", ["t2v", "i2v", "video_edit"])
def test_the_initial_and_the_final_latents(model, name):
    """Of a video that begins with a picture the first frame's are the picture's, and stay."""
    case, events = named[name], []
    model.run(case.inputs, on_step=events.append, **case.options)
    assert relative(events[0].x_t, case.tensors["flow.0.x_t"]) < 1e-5
    last, schedule = events[-1], case.tensors["schedule"]
    moved = last.x_t - (schedule[-2] - schedule[-1]) * last.v_t
    if name == "i2v":
        first = case.tensors["vae_encode.0.latent"].flatten(0, 2)
        moved[: len(first)] = last.x_t[: len(first)]
        assert relative(moved[: len(first)], first) < 1e-5
    assert relative(moved, case.tensors["latent"]) < 1e-4


@CASES
def test_keys_and_values_of_the_contexts(model, case):
    plan = make_plan(case.request(), model.config, model.tokenizer)
    for name, blocks in (("main", plan.main), ("text", plan.cfg_text)):
        if blocks is None:
            continue
        stored = {kind: case.tensors[f"prefill.{name}.{kind}"] for kind in "kv"}
        keys, values = prefill(model, plan, blocks, fit_profile([plan], round_up=False))
        for got, kind in ((keys, "k"), (values, "v")):
            assert got.shape == stored[kind].shape
            assert relative(got, stored[kind]) < 1e-4


@CASES
def test_positions(model, case):
    plan = make_plan(case.request(), model.config, model.tokenizer)
    for name, blocks, target in (("main", plan.main, 0), ("text", plan.cfg_text, 1)):
        if blocks is None:
            continue
        found = [positions(block) for block in (*blocks, *plan.targets[target : target + 1])]
        want = case.tensors[f"positions.{name}"].numpy()
        if name == "main":
            got = np.concatenate(found, axis=1)
            assert np.array_equal(got, want[:, : got.shape[1]])
        else:  # the context keeps the positions of the whole chat
            count = found[-1].shape[1]
            assert np.array_equal(found[-1], want[:, -count - 1 : -1])


def positions(block):
    """[3, tokens] in the official order: a picture between its markers."""
    if block.kind == "text":
        return np.tile(np.arange(block.start, block.start + block.length), (3, 1))
    placed = block.placed(0, block.tokens)
    return np.concatenate([placed[:, :1], placed[:, 2:], placed[:, 1:2]], axis=1)


@pytest.fixture(scope="module")
def alone(model):
    """Every case by itself in exactly fitting shapes: outputs and events."""
    found = []
    for case in ALL:
        events = []
        found.append((model.run(case.inputs, on_step=events.append, **case.options), events))
    return found


@examples(30)
@given(st.data())
def test_shapes_neighbours_and_garbage_change_nothing(model, alone, data):
    chosen = data.draw(st.lists(st.integers(0, len(ALL) - 1), min_size=1, max_size=4))
    events = [[] for _ in chosen]
    requests = [ALL[i].request(on_step=seen.append) for i, seen in zip(chosen, events, strict=True)]
    need = fit_profile([make_plan(r, model.config, model.tokenizer) for r in requests], round_up=False)
    more = st.integers(0, 40)
    profile = Profile(
        "drawn",
        rows=data.draw(st.integers(1, 5)),
        text=data.draw(st.integers(7, 80)),
        patches=need.patches + data.draw(more),
        latents=need.latents + data.draw(more),
        slots=500 + data.draw(more),
    )
    other = bagel_opt.Model(Poisoned(prepare(model.runtime.model)), model.config, model.tokenizer, [profile])
    for i, outputs, seen in zip(chosen, other.run_many(requests), events, strict=True):
        ALL[i].check_outputs(outputs)
        for got, want in zip(seen, alone[i][1], strict=True):
            assert relative(got.v_t, want.v_t) < 1e-5


def test_all_together(model):
    for case, outputs in zip(ALL, model.run_many([case.request() for case in ALL]), strict=True):
        case.check_outputs(outputs)


@pytest.mark.parametrize("name", ["image_edit", "video_edit", "x2t_video"])
def test_capacity_is_used_to_the_last_slot(model, name):
    case = named[name]
    plan = make_plan(case.request(), model.config, model.tokenizer)
    text, patches, latents = 16, 64, 64
    need = plan.peak(text, patches, latents)[1]
    fits = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("fits", 2, need, text, patches, latents))
    case.check_outputs(fits.run(case.inputs, **case.options))
    small = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("small", 2, need - 1, text, patches, latents))
    with pytest.raises(ProfileError, match=f"slots of at least {need}.*slots = {need - 1}"):
        small.run(case.inputs, **case.options)


@pytest.mark.parametrize("cache", ["taylorseer", "teacache"])
def test_step_caches_keep_a_clean_first_frame_and_leave_nothing_behind(model, cache):
    case, events = named["i2v"], []
    options = case.options | {"num_timesteps": 12, "step_cache": cache}
    model.run(case.inputs, on_step=events.append, **options)
    first = case.tensors["vae_encode.0.latent"].flatten(0, 2)
    assert all(relative(event.x_t[: len(first)], first) < 1e-5 for event in events)
    case.check_outputs(model.run(case.inputs, **case.options))


def test_weights_that_come_and_go(model):
    """Under a cap of memory the encoders' weights are on the device for a call alone."""
    profile = Profile("some", 3, 300, 32, 64, 64)
    with pytest.raises(ValueError, match="takes at least '") as error:
        bagel_opt.load(CHECKPOINT, device="cpu", memory=1, profile=profile)
    least = str(error.value).split("takes at least '")[1].split("'")[0]
    small = bagel_opt.load(CHECKPOINT, device="cpu", memory=least, profile=profile)
    assert {"vit", "vae_encode", "vae_decode"} <= small.runtime.plan.away
    for name in ("i2v", "video_edit", "x2t_video"):
        named[name].check_outputs(small.run(named[name].inputs, **named[name].options))
    long = named["t2v"].options | {"num_frames": 121, "height": 256, "width": 256, "noise": None}
    with pytest.raises(ProfileError, match="latents of at least 7936"):  # before anything is computed
        small.run(named["t2v"].inputs, **long)


@pytest.mark.parametrize(("kinds", "most"), [({"gen": "int8", "vit": "int8"}, 0.2), ({"embeddings": "int8"}, 0.01)])
def test_quantised_weights_draw_nearly_the_same(kinds, most):
    coarse, events = bagel_opt.load(CHECKPOINT, device="cpu", quantization=kinds), []
    case = named["image_edit"]
    coarse.run(case.inputs, on_step=events.append, **case.options)
    assert 1e-4 < case.velocity_error(events) < most


def test_methods(model):
    """The calls that people write."""
    few = {"num_timesteps": 2, "seed": 1}
    picture = model.generate("a red circle", height=64, width=96, **few)
    assert picture.size == (96, 64)
    frames = model.generate("a ball", output="video", height=48, width=64, num_frames=7, **few)
    assert [frame.size for frame in frames] == [(64, 48)] * 5
    began = model.generate("it rolls", image=picture, output="video", num_frames=5, resolution_vae=64, **few)
    assert len(began) == 5
    assert model.edit(picture, "make it blue", resolution_vae=64, resolution_vit=84, **few).size == (80, 48)
    edited = model.edit(video=frames, instruction="faster", resolution_vae=64, resolution_vit=84, **few)
    assert len(edited) == 5
    small = {"max_think_tokens": 3, "resolution_vit": 84}
    assert isinstance(model.understand(picture, "what is this?", **small), str)
    assert isinstance(model.understand(video=frames, question="what is this?", **small), str)
    [resized] = model.run(["blue", picture], size="input", resolution_vae=64, resolution_vit=84, **few)
    assert resized.size == picture.size
    with pytest.raises(ValueError, match="image is the first frame of a video"):
        model.generate("it rolls", image=picture)


def test_the_same_seed_draws_the_same(model):
    options = {"num_timesteps": 2, "seed": 3, "height": 32, "width": 32, "output": "video", "num_frames": 5}
    first, second = (np.stack(model.generate("a", **options)) for _ in range(2))
    assert np.array_equal(first, second)


def adapter(folder, factor=1.0):
    """A LoRA of one product, and that product with it."""
    name, generator = "language_model.model.layers.1.self_attn.q_proj_moe_gen", torch.Generator().manual_seed(0)
    down, up = (0.2 * torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 4)))
    folder.mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": factor * up}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj_moe_gen"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_merged_and_apart(model, tmp_path):
    case, events = named["t2v"], {}
    lora = adapter(tmp_path / "lora")
    merged = bagel_opt.load(CHECKPOINT, device="cpu", lora=[lora])
    apart = bagel_opt.load(CHECKPOINT, device="cpu", adapters={"a": lora})
    for name, one, options in (("merged", merged, {}), ("apart", apart, {}), ("without", apart, {"adapters": {}})):
        one.run(case.inputs, on_step=events.setdefault(name, []).append, **case.options, **options)
    assert case.velocity_error(events["without"]) < 1e-4
    assert case.velocity_error(events["merged"]) > 1e-3
    for got, want in zip(events["apart"], events["merged"], strict=True):
        assert relative(got.v_t, want.v_t) < 1e-4


def test_of_a_video_the_first_frames_alone_are_handed_over_ahead(model, monkeypatch):
    """All of a long one would fill the device."""
    handed, seen, run = [], [], TorchRuntime.run
    monkeypatch.setattr(TorchRuntime, "ahead", lambda _, values: handed.append(values) or values)
    monkeypatch.setattr(TorchRuntime, "run", lambda self, name, *given: seen.append(name) or run(self, name, *given))
    model.run(named["x2t_video"].inputs, **{**named["x2t_video"].options, "max_think_tokens": 2})
    assert (len(handed), seen.count("vit")) == (1, 3)


class Watched(TorchRuntime):
    """Keeps the logits that it computed."""

    def run(self, program, *given):
        out = super().run(program, *given)
        if program.startswith("decode"):
            self.logits.append(out[0][0])
        return out


@pytest.mark.parametrize("name", ["x2t_image", "x2t_video"])
def test_logits(model, name):
    """Those of tokens that the tokenizer has; others are never written."""
    case, limit = named[name], model.config.token_limit
    runtime = Watched(prepare(model.runtime.model))
    runtime.logits = []
    bagel_opt.Model(runtime, model.config, model.tokenizer).run(case.inputs, **case.options)
    want = case.tensors["gen_text.0.logits"]
    assert limit < want.shape[1] == model.config.llm.vocab_size
    got = torch.stack(runtime.logits[: len(want)])
    assert relative(got[:, :limit], want[:, :limit]) < 1e-4
    assert (got[:, limit:] < got[:, :limit].min() - 1e6).all()
