"""A video takes several calls of the encoders and the decoder: other requests go on between them."""

import itertools

import numpy as np
import pytest
from lance_cases import loaded
from PIL import Image

from bagel_opt import Profile, Request
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

PROFILE = Profile("parts", rows=6, slots=600, text=64, patches=200, latents=200)
SMALL = {"height": 32, "width": 48, "seed": 1, "cfg_text_scale": 1.0}
VIDEO = {"output": "video", "num_frames": 13, "num_timesteps": 2, **SMALL}
PICTURE = {"num_timesteps": 9, **SMALL}


class Logged:
    """A runtime that keeps the names of the programs that ran."""

    def __init__(self, runtime):
        self.runtime, self.ran = runtime, []

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def run(self, program, *arguments):
        self.ran.append(program)
        return self.runtime.run(program, *arguments)


@pytest.fixture
def engine():
    model = loaded()
    return Engine(Logged(model.runtime), model.config, model.tokenizer, PROFILE)


def plan(inputs, **options):
    model = loaded()
    return make_plan(Request(inputs, **options), model.config, model.tokenizer)


def others_between(ran, program):
    """Of each two calls in a row of a program and its continuation: whether a flow step came between them."""
    places = [place for place, name in enumerate(ran) if name.startswith(program)]
    return ["step" in ran[a:b] for a, b in itertools.pairwise(places)]


def same(frames, others):
    """Up to rounding."""
    pairs = zip(frames, others, strict=True)
    return all(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1 for a, b in pairs)


def test_others_draw_while_a_video_is_decoded(engine):
    [video], [picture] = engine.run([plan(["a ball"], **VIDEO), plan(["a ball"], **PICTURE)])
    decoded = [name for name in engine.runtime.ran if name.startswith("vae_decode")]
    assert decoded == ["vae_decode", *["vae_decode_next"] * 3, "vae_decode"]
    assert others_between(engine.runtime.ran, "vae_decode")[1:3] == [True] * 2  # the first part is a single frame
    assert same(video, loaded().generate("a ball", **VIDEO))
    assert same([picture], [loaded().generate("a ball", **PICTURE)])


def test_others_draw_while_a_video_is_read(engine):
    frames = [Image.new("RGB", (64, 48), (20 * number, 100, 50)) for number in range(13)]
    read = {
        "video": frames,
        "output": "video",
        "num_timesteps": 2,
        "seed": 1,
        "resolution_vae": 64,
        "resolution_vit": 84,
    }
    [video], _ = engine.run([plan(["red"], **read), plan(["a ball"], **{**PICTURE, "num_timesteps": 30})])
    assert others_between(engine.runtime.ran, "vae_encode") == [True] * 3
    reads = [name for name in engine.runtime.ran if name.startswith("vit")]
    assert reads == [*["vit"] * 7, "vit_context"]
    assert others_between(engine.runtime.ran, "vit")[3:6] == [True] * 3  # before that, the other reads its text
    assert same(video, loaded().run(["red"], **read)[0])


def test_one_video_at_a_time(engine):
    """What is kept from part to part would take memory that nobody has counted."""
    videos = engine.run([plan(["a ball"], **VIDEO), plan(["a ball"], **{**VIDEO, "seed": 2})])
    decoded = [name for name in engine.runtime.ran if name.startswith("vae_decode")]
    assert decoded == ["vae_decode", *["vae_decode_next"] * 3] * 2
    for [video], seed in zip(videos, (1, 2), strict=True):
        assert same(video, loaded().generate("a ball", **{**VIDEO, "seed": seed}))


def test_who_is_cancelled_or_fails_in_the_middle_lets_the_next_go_on(engine):
    first, second = (engine.submit(plan(["a ball"], **{**VIDEO, "seed": seed})) for seed in (1, 2))
    while "vae_decode" not in engine.runtime.ran:
        engine.step()
    engine.cancel(first)
    for _ in range(40):
        engine.step()
    assert first.result is None
    assert same(second.result[0], loaded().generate("a ball", **{**VIDEO, "seed": 2}))

    def failing(program, *arguments):
        if program == "vae_decode_next":
            raise RuntimeError("device lost")
        return Logged.run(engine.runtime, program, *arguments)

    engine.runtime.run = failing
    [failed] = engine.run([plan(["a ball"], **VIDEO)])
    assert str(failed) == "device lost"
    assert engine.batches.coding == 0
