"""The engine between its steps: requests come, go, fail and are given up, and the others get what they get alone."""

import random

import numpy as np
import pytest
from serving import Held
from support import CHECKPOINT, cases

from bagel_opt.request import Request
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

SHORT = {"num_timesteps": 6, "seed": 5}
SHORT_ROUNDS = {"max_rounds": 2, "max_think_tokens": 9, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


@pytest.fixture
def engine(model):
    return Engine(Held(model.runtime).for_profile(model.profile), model.config, model.tokenizer, model.profile)


@pytest.fixture(scope="module")
def plan(model):
    return lambda inputs, **options: make_plan(Request(inputs, **options), model.config, model.tokenizer)


def finish(engine):
    ended = []
    while engine.waiting or engine.active:
        ended += engine.step()
    assert len(engine.batches.free) == engine.profile.rows * engine.profile.batches
    return ended


def same(got, want):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True))


def test_the_same_bits_whoever_else_is_served(model, engine, plan):
    """Requests of all kinds come at random steps, some are given up, and every answer equals the request's alone."""
    image = next(case for case in cases() if case.name == "image_editing").inputs[0]
    kinds = [
        (["a red circle"], {**SHORT, "height": 64, "width": 64}),
        (["a red circle"], {**SHORT, "height": 96, "width": 128, "cfg_text_scale": 1.0}),
        (["a blue square on the left of a green one " * 4], {**SHORT, "num_timesteps": 9}),
        ([image, "make it green"], SHORT),
        (["a ring"], {**SHORT, "think": True, "max_think_tokens": 12}),
        (["a ring"], {**SHORT, "step_cache": "taylorseer", "num_timesteps": 12}),
        (["a ring"], {**SHORT, "step_cache": "teacache", "num_timesteps": 30}),
        ([image, "what is in the image?"], {"output": "text", "max_think_tokens": 90, "seed": 1, "do_sample": True}),
        (["tell me a tale"], {"output": "text", "max_think_tokens": 130}),
        ([image, "and then?"], {**SHORT, "output": "interleaved", "max_rounds": 2, "max_think_tokens": 9}),
        (
            ["a ring"],
            {**SHORT, "output": "interleaved", "interleaved_context": "main", "draw_marker": ""} | SHORT_ROUNDS,
        ),
    ]
    alone = [model.run(inputs, **options) for inputs, options in kinds]
    rng, jobs, given_up = random.Random(0), {}, 0
    for _ in range(40):
        kind = rng.randrange(len(kinds))
        jobs[engine.submit(plan(kinds[kind][0], **kinds[kind][1]))] = kind
        for _ in range(rng.randrange(12)):
            engine.step()
        if rng.random() < 0.2:
            job = rng.choice([*engine.active, *engine.waiting] or [None])
            if job:
                engine.cancel(job)
                given_up += job.result is None
                del jobs[job]
    finish(engine)
    assert given_up > 2
    assert len(jobs) > 20
    for job, kind in jobs.items():
        assert not isinstance(job.result, Exception), job.result
        assert same(job.result, alone[kind]), kinds[kind]


@pytest.mark.parametrize("program", ["decode", "generate"])
@pytest.mark.parametrize("kv_len", [0, 62, 63, 126, 190])
def test_a_row_has_the_same_bits_in_any_row_beside_anyone(model, program, kv_len):
    """Alone in the program of one row, and in the whole batch beside short and long rows. Lengths next to multiples of
    16 are where sums would be grouped by the longest row's length."""
    runtime, p, rng = model.runtime.for_profile(model.profile), model.profile, np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    mine, latents = [draw(*cache.shape[1:]) for cache in runtime.caches(1, p.slots)], draw(p.latents, 64)

    def run(row, others, whole):
        caches = [draw(*cache.shape) for cache in runtime.caches(p.rows, p.slots)]
        for cache, values in zip(caches, mine, strict=True):
            cache[row] = values
        position, kv_lens = np.full(p.rows, 9), np.full(p.rows, others)
        position[row], kv_lens[row] = 5, kv_len
        if program == "decode":
            ids = rng.integers(0, 100, p.rows)
            ids[row] = 7
            inputs = [ids, position, kv_lens]
        else:
            x, t, index = draw(p.rows, p.latents, 64), draw(p.rows), np.tile(np.arange(p.latents), (p.rows, 1))
            x[row], t[row] = latents, 0.5
            inputs = [x, t, index, position, np.full(p.rows, p.latents), kv_lens]
        if whole:
            return runtime.run(program, inputs, caches)[0][row]
        return runtime.run(f"{program}_row", [x[row : row + 1] for x in inputs], caches, row)[0][0]

    want = run(0, 0, whole=False)
    for row in range(p.rows):
        for others in (0, 5, 70, 130, 333, p.slots - p.latents - 2):
            assert np.array_equal(run(row, others, whole=True), want), (row, others)


def test_rows_of_a_request_given_up_are_free_at_once(engine, plan):
    drawing, waiting = (engine.submit(plan(["a"], **SHORT)) for _ in range(2))
    while drawing.want is None:
        engine.step()
    assert len(engine.batches.free) == 1  # and the second waits for two
    engine.cancel(drawing)
    assert len(engine.batches.free) == 3
    engine.step()
    assert engine.active == [waiting]
    engine.cancel(waiting)
    engine.cancel(waiting)
    assert finish(engine) == []


def test_an_answer_need_not_wait_for_a_picture(engine, plan):
    """Nor a picture for an answer: both go on in the same rounds."""
    picture = engine.submit(plan(["a"], num_timesteps=40, cfg_text_scale=1.0))
    engine.step()
    text = engine.submit(plan(["b"], output="text", max_think_tokens=4))
    assert finish(engine) == [text, picture]
    text = engine.submit(plan(["b"], output="text", max_think_tokens=400))
    picture = engine.submit(plan(["a"], num_timesteps=4, cfg_text_scale=1.0))
    assert finish(engine)[0] is picture


def test_small_requests_may_pass_large_ones_but_not_for_ever(engine, plan):
    """A picture of two rows waits for another's; eight short answers pass it in the free row, the ninth does not."""
    first = engine.submit(plan(["a"], **{**SHORT, "num_timesteps": 200}))
    engine.step()
    second = engine.submit(plan(["a"], **SHORT))
    texts = [engine.submit(plan(["b"], output="text", max_think_tokens=2)) for _ in range(9)]
    ended = finish(engine)
    assert ended[:8] == texts[:8]
    assert ended[8] is first
    assert {*ended[9:]} == {second, texts[8]}


def test_a_long_prompt_is_read_between_the_steps_of_others(engine, plan):
    picture = engine.submit(plan(["a"], num_timesteps=40, cfg_text_scale=1.0))
    while picture.want is None:
        engine.step()
    first = picture.want
    engine.submit(plan(["many words " * 60], output="text", max_think_tokens=2))
    engine.step()
    assert picture.want != first  # one chunk of it was read, and the picture went on
    finish(engine)


@pytest.mark.parametrize("broken", ["decode", "generate"])
def test_a_program_that_raises_ends_its_own_requests(engine, plan, broken):
    failure = RuntimeError("broken")
    engine.runtime.failing.update({broken: failure, broken + "_row": failure})
    text = engine.submit(plan(["b"], output="text", max_think_tokens=4))
    picture = engine.submit(plan(["a"], **SHORT))
    finish(engine)
    fails, works = (text, picture) if broken == "decode" else (picture, text)
    assert fails.result is failure
    assert not isinstance(works.result, Exception)
    engine.runtime.failing.clear()
    again = engine.submit(plan(["a"], **SHORT))
    finish(engine)
    assert not isinstance(again.result, Exception)
