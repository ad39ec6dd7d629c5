"""NaN and infinities do not pass for answers, and stay with the request in which they arose."""

import numpy as np
import pytest
from bundles import BACKENDS, PROFILES
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.cli.commands import main
from bagel_opt.request import Request
from bagel_opt.sampling import calls
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.job import Token
from bagel_opt.sampling.planning import make_plan

PICTURE = {"num_timesteps": 3, "height": 32, "width": 32, "seed": 0}
TEXT = {"output": "text", "max_think_tokens": 12}


@pytest.fixture
def poisoned():
    """A model of one's own, and a function that makes a part's weights NaN."""
    model = bagel_opt.load(CHECKPOINT, device="cpu")
    return model, lambda part: model.runtime.model.get_submodule(part).weight.data.fill_(float("nan"))


@pytest.mark.parametrize("part", ["llm.lm_head", "llm.embed", "llm.layers.1.und.o"])
def test_a_text_of_nan_is_an_error(poisoned, part):
    model, poison = poisoned
    poison(part)
    with pytest.raises(FloatingPointError, match=r"text's logits are NaN or infinite.*float32"):
        model.chat("a", max_think_tokens=4)
    with pytest.raises(FloatingPointError, match="text's logits"):
        model.run("a", think=True, do_sample=True, max_think_tokens=4, **PICTURE)


@pytest.mark.parametrize(
    ("part", "what"), [("vae.decoder.conv_out", "decoded picture's pixels"), ("latent_out", "picture's latents")]
)
def test_a_picture_of_nan_is_an_error(poisoned, part, what):
    model, poison = poisoned
    poison(part)
    with pytest.raises(FloatingPointError, match=rf"{what} are NaN or infinite.*float32"):
        model.generate("a", **PICTURE)


@pytest.mark.parametrize("command", [["chat", "a"], ["generate", "a", "--num-timesteps", "2", "--out", "a.png"]])
def test_commands_say_so_in_one_line(poisoned, command, capsys, monkeypatch, tmp_path):
    model, poison = poisoned
    for part in ("llm.lm_head", "vae.decoder.conv_out"):
        poison(part)
    monkeypatch.setattr("bagel_opt.cli.commands.load", lambda *a, **k: model)
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--checkpoint", str(CHECKPOINT)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "NaN or infinite" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.second if b == "aoti" else ()) for b in BACKENDS]
)
def test_every_runtime_sees_them(load, backend):
    model, profile = load(CHECKPOINT, backend), PROFILES[CHECKPOINT]
    runtime, vocabulary = model.runtime.for_profile(profile), model.config.llm.vocab_size
    plain = np.random.default_rng(0).standard_normal((profile.rows, vocabulary), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, vocabulary // 2, vocabulary - 1):
            for temperature in (0.0, 0.7):
                logits = plain.copy()
                logits[1, place] = value
                numbers = [np.full(profile.rows, number, np.float32) for number in (temperature, 0.3)]
                want = runtime.host(runtime.run("choose", [plain, *numbers])[0])
                got = runtime.host(runtime.run("choose", [logits, *numbers])[0])
                assert got.tolist() == [want[0], -1, want[2]]
                one = [x[1:2] for x in (logits, *numbers)]
                assert runtime.host(runtime.run("choose_row", one)[0]).tolist() == [-1]
    latent = np.random.default_rng(0).standard_normal((1, model.config.vae.z_channels, 8, 8), np.float32)
    for value, finite in ((0.0, 1), (np.nan, 0), (np.inf, 0)):
        latent[0, 3, 4, 5] = value
        picture, flag = map(runtime.host, runtime.run("vae_decode", [latent]))
        assert (picture.dtype, flag.tolist()) == (np.uint8, [finite])


def engine_of(model, rows=3):
    profile = model.profile or Profile("rows", rows, 300, 64, 64, 64)
    return Engine(model.runtime.for_profile(profile), model.config, model.tokenizer, profile)


def finish(engine):
    while engine.waiting or engine.active:
        engine.step()


@pytest.mark.parametrize("backend", ["eager", "onnx", "export"])
def test_a_poisoned_row_ends_its_own_request(load, backend):
    model = load(CHECKPOINT, backend)
    engine, plan = engine_of(model), make_plan(Request("a tale", **TEXT), model.config, model.tokenizer)
    jobs = [engine.submit(plan) for _ in range(3)]
    while not all(isinstance(job.want, Token) for job in jobs):
        engine.step()
    for cache in engine.batches[0].caches:
        cache[jobs[1].main.row] = float("nan")
    finish(engine)
    assert isinstance(jobs[1].result, FloatingPointError)
    assert jobs[0].result == jobs[2].result == model.run("a tale", **TEXT)


@pytest.mark.parametrize("backend", ["eager", "export"])
def test_what_an_overflow_leaves_reaches_nobody(load, backend, monkeypatch):
    """A text takes the row of a picture that overflowed, and another picture is drawn in all rows at once."""
    monkeypatch.setattr(calls, "CALL", 1e18)
    model = load(CHECKPOINT, backend)
    engine = engine_of(model)

    def submit(inputs, **options):
        return engine.submit(make_plan(Request(inputs, **options), model.config, model.tokenizer))

    huge = submit("a", **{**PICTURE, "cfg_text_scale": 1.0}, noise=np.full((4, 64), 3e38, np.float32))
    finish(engine)
    assert isinstance(huge.result, FloatingPointError)
    text = submit("a tale", **TEXT)
    picture = submit("a cat", **{**PICTURE, "num_timesteps": 20})
    finish(engine)
    assert text.result == model.run("a tale", **TEXT)
    want = model.run("a cat", **{**PICTURE, "num_timesteps": 20})[0]
    assert isinstance(want, Image.Image)
    assert np.array_equal(np.asarray(picture.result[0]), np.asarray(want))
