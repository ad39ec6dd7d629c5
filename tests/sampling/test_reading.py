"""What requests read: texts together, pictures one after another, and neither shows in what they answer."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support import CHECKPOINT

from bagel_opt import Profile, Request
from bagel_opt.images import InputImage
from bagel_opt.sampling import engine as engines
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

PROFILE = Profile("many", rows=4, slots=512, text=64, patches=64, latents=256)
TEXTS = "why?", "a b c", "who is it that asks", "a tale of two cities " * 4
WRITE = {"output": "text", "max_think_tokens": 12}


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "eager")


@pytest.fixture
def ran(model, monkeypatch):
    """Every program, and rows and tokens that it was for."""
    found, run = [], type(model.runtime).run

    def noted(self, program, inputs, caches=(), rows=None):
        found.append((program, *inputs[0].shape[:2]))
        return run(self, program, inputs, caches, rows)

    monkeypatch.setattr(type(model.runtime), "run", noted)
    return found


def start(model, requests, profile=PROFILE):
    engine = Engine(model.runtime, model.config, model.tokenizer, profile)
    return engine, [engine.submit(make_plan(request, model.config, model.tokenizer)) for request in requests]


def finish(engine):
    while engine.waiting or engine.active:
        engine.step()


def read(ran):
    return [shape for program, *shape in ran if program == "text"]


def test_texts_of_several_requests_are_read_together(model, ran):
    """In as many tokens as the longest has; each answers what it answers alone."""
    alone = [model.run([text], **WRITE) for text in TEXTS]
    ran.clear()
    engine, jobs = start(model, [Request([text], **WRITE) for text in TEXTS])
    finish(engine)
    assert [job.result for job in jobs] == alone
    assert read(ran)[0] == [4, 64]
    assert len(read(ran)) <= 2  # the last one's second call


def test_one_row_at_a_time_where_the_program_takes_no_more(model, ran, monkeypatch):
    monkeypatch.setattr(model.runtime, "free_texts", False)
    engine, jobs = start(model, [Request([text], **WRITE) for text in TEXTS[:3]])
    finish(engine)
    assert read(ran) == [[1, 64]] * 3
    assert all(isinstance(job.result[0], str) for job in jobs)


def test_no_more_tokens_than_another_program_has_room_for(model, ran):
    engine, _ = start(
        model,
        [Request([text], **WRITE) for text in TEXTS[:3]],
        Profile("few", 4, 512, text=64, patches=64, latents=32),
    )
    finish(engine)
    assert read(ran) == [[2, 64], [1, 64]]  # as many as the latents of all rows


def test_texts_that_lack_memory_together_are_read_one_by_one(model, ran, monkeypatch):
    """And one that lacks it alone ends alone."""
    alone, run = [model.run([text], **WRITE) for text in TEXTS[:3]], type(model.runtime).run
    engine, jobs = start(model, [Request([text], **WRITE) for text in TEXTS[:3]])

    def small(self, program, inputs, caches=(), rows=None):
        if program == "text" and (len(inputs[0]) > 1 or rows == slice(1, 2)):
            raise MemoryError(f"no memory for {rows}")
        return run(self, program, inputs, caches, rows)

    monkeypatch.setattr(type(model.runtime), "run", small)
    finish(engine)
    assert isinstance(jobs[1].result, MemoryError)
    assert [jobs[0].result, jobs[2].result] == [alone[0], alone[2]]


def test_rows_that_are_no_neighbours_are_read_apart(model, ran):
    engine, jobs = start(model, [Request([text], **WRITE) for text in TEXTS[:3]])
    engine._admit()
    engine.cancel(jobs[1])
    finish(engine)
    assert read(ran) == [[1, 64]] * 2


@pytest.mark.parametrize(("text", "calls"), [(64, 1), (16, 3)])
def test_texts_that_follow_each_other_are_read_in_one_call(model, ran, text, calls):
    """Where they fit. A row that begins alike may take over any of them."""
    options = {"cfg_img_scale": 1.5, "num_timesteps": 4, "seed": 1, "height": 64, "width": 64}
    want = model.run(["a red circle", "on a table"], system_prompt="You draw.", **options)[-1]
    ran.clear()
    request = Request(["a red circle", "on a table"], system_prompt="You draw.", **options)
    engine, (job,) = start(model, [request], Profile("p", 4, 512, text=text, patches=64, latents=256))
    finish(engine)
    assert np.abs(np.asarray(job.result[-1]).astype(int) - np.asarray(want)).max() <= 1
    lengths = [block.length for block in job.plan.main]
    assert len(lengths) == 3
    assert sum(lengths) <= 64
    assert len(read(ran)) == calls


def test_a_request_may_write_before_the_others_pictures_are_read(model, ran, monkeypatch):
    """Pictures are read in the order of requests."""
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    requests = [Request([picture, "what is it?"], **WRITE) for picture in pictures]
    alone = [model.run(request.inputs, **WRITE) for request in requests]
    monkeypatch.setattr(engines, "PAUSE", 0)
    ran.clear()
    engine, jobs = start(model, requests)
    finish(engine)
    assert [job.result for job in jobs] == alone
    order = [program.removesuffix("_row") for program, *_ in ran if program.startswith(("vit_context", "decode"))]
    assert order[:4] == ["vit_context", "decode", "vit_context", "decode"]
    ran.clear()
    monkeypatch.setattr(engines, "PAUSE", 60)
    finish(start(model, requests)[0])
    order = [program.removesuffix("_row") for program, *_ in ran if program.startswith(("vit_context", "decode"))]
    assert order[:4] == ["vit_context"] * 3 + ["decode"]


def test_a_request_with_many_pictures_does_not_keep_others_waiting(model, ran, monkeypatch):
    """While somebody writes, one picture is read between two tokens."""
    monkeypatch.setattr(engines, "PAUSE", 0)
    engine, _ = start(model, [Request(["why?"], output="text", max_think_tokens=40)])
    engine.step()
    seen = []
    for colors in (["red", "green", "blue", "black"], ["white"]):
        pictures = [Image.new("RGB", (64, 64), color) for color in colors]
        job = engine.submit(make_plan(Request([*pictures, "what?"], **WRITE), model.config, model.tokenizer))
        monkeypatch.setattr(
            job.encoded, "_see", lambda *given, job=job, see=job.encoded._see: seen.append(job) or see(*given)
        )
    first, second = engine.waiting
    finish(engine)
    assert seen.index(second) == 1
    assert seen.count(first) == 4


def test_pictures_are_cut_in_a_thread_of_their_own(model, monkeypatch):
    """All of them, while the first is read."""
    cut, by = InputImage.patches, []
    monkeypatch.setattr(InputImage, "patches", lambda image: by.append(threading.current_thread().name) or cut(image))
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "green")]
    model.run([*pictures, "what?"], **WRITE)
    assert len(by) == 2
    assert all(name.startswith("patches") for name in by)


def test_patches_are_handed_to_the_device_in_that_thread(model, monkeypatch):
    """As the ViT takes them."""
    handed, taken, run = [], [], type(model.runtime).run

    def ahead(self, values):
        handed.append(torch.from_numpy(values).clone())
        assert threading.current_thread().name.startswith("patches")
        return handed[-1]

    def noted(self, program, inputs, caches=(), rows=None):
        taken.extend(inputs[:1] if program == "vit" else ())
        return run(self, program, inputs, caches, rows)

    request = Request([Image.effect_mandelbrot((64, 64), (-2, -1.2, 1, 1.2), 30).convert("RGB"), "what?"], **WRITE)
    alone = model.run_many([request])
    monkeypatch.setattr(type(model.runtime), "run", noted)
    monkeypatch.setattr(type(model.runtime), "ahead", ahead)
    assert model.run_many([request]) == alone
    assert [id(tensor) for tensor in handed] == [id(tensor) for tensor in taken]
    assert handed[0].shape[2] == model.config.vit.patch_dim


def test_a_picture_that_cannot_be_cut_ends_its_request_alone(model):
    """Which is found in a thread of its own."""
    engine, (bad, good) = start(model, [Request([Image.new("RGB", (64, 64)), "what?"], **WRITE)] * 2)

    class Broken:
        def patches(self):
            raise MemoryError("no memory for patches")

    bad.plan.images[0] = Broken()
    finish(engine)
    assert isinstance(bad.result, MemoryError)
    assert isinstance(good.result[0], str)
