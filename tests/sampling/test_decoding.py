"""Tokens of which the next ones are computed while the host still looks at them: what a device does, here on the CPU."""

import functools
import random

import numpy as np
import pytest
import torch
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

TEXTS = [case for case in cases() if isinstance(case.outputs[0], str)]
WRITE = {"output": "text", "max_think_tokens": 30}


@pytest.fixture(scope="module")
def model():
    profile = Profile("small", rows=2, slots=768, text=64, patches=64, latents=64)
    return bagel_opt.load(CHECKPOINT, device="cpu", profile=profile)


@pytest.fixture
def ran(monkeypatch):
    """Every decoding, as rows that it was for, where the device goes on with what it chose."""
    found, run = [], TorchRuntime.run

    def noted(self, program, inputs, *others):
        if program.startswith("decode"):
            found.append(len(inputs[0]))
        return run(self, program, inputs, *others)

    def chosen(self, ids_B):
        return functools.partial(self.host, ids_B), ids_B.clamp(min=0)

    monkeypatch.setattr(TorchRuntime, "run", noted)
    monkeypatch.setattr(TorchRuntime, "chosen", chosen)
    return found


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_official_texts(model, ran, case):
    """With one decoding too many at most, of a text that ends by itself."""
    tokens = []
    case.check_outputs(model.run(case.inputs, **case.options, on_token=tokens.append))
    assert len(ran) <= len(tokens) + 2


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.8}, {"stop": ["a"]}], ids=str
)
def test_requests_that_come_and_go(model, ran, options, monkeypatch):
    """Each writes what it writes alone without that, whoever joins, ends, reads or draws meanwhile."""
    kinds = [Request([f"why {n}?"], seed=n, **{**WRITE, "max_think_tokens": 5 + 9 * n}, **options) for n in range(4)]
    kinds.append(Request(["a b"], seed=3, num_timesteps=6, height=64, width=64))
    kinds.append(
        Request(["a tale"], seed=4, output="interleaved", max_rounds=2, max_think_tokens=9, height=64, width=64)
    )
    with monkeypatch.context() as patch:
        patch.setattr(TorchRuntime, "chosen", lambda self, ids: (functools.partial(self.host, ids), None))
        alone = [model.run_many([request])[0] for request in kinds]
    engine = Engine(model.runtime.for_profile(model.profile), model.config, model.tokenizer, model.profile)
    rng, jobs = random.Random(0), []
    for turn in range(12):
        number = turn % len(kinds)
        jobs.append((number, engine.submit(make_plan(kinds[number], model.config, model.tokenizer))))
        for _ in range(rng.randrange(9)):
            engine.step()
        if turn == 5:
            engine.cancel(next(job for _, job in jobs if job.result is None))
    while engine.waiting or engine.active:
        engine.step()
    ended = [(number, job.result) for number, job in jobs if job.result is not None]
    assert len(ended) == 11
    for number, result in ended:
        for got, want in zip(result, alone[number], strict=True):
            if isinstance(want, str):
                assert got == want
            else:  # in eager mode rows are rounded as their number has it
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1


def test_a_text_that_is_alone_again(model, ran):
    """What was launched for it alone, before another came, is of no use any more."""
    requests = [Request([text], **{**WRITE, "max_think_tokens": n}) for text, n in (("why?", 30), ("a b", 6))]
    plans = [make_plan(request, model.config, model.tokenizer) for request in requests]
    want = [model.run_many([request])[0] for request in requests]
    engine = Engine(model.runtime.for_profile(model.profile), model.config, model.tokenizer, model.profile)
    jobs = [engine.submit(plans[0])]
    for _ in range(8):
        engine.step()
    jobs.append(engine.submit(plans[1]))
    while engine.waiting or engine.active:
        engine.step()
    assert [job.result for job in jobs] == want
    assert {1, 2} == set(ran)


def test_nothing_goes_ahead_past_the_last_token(model, ran):
    tokens = []
    model.run(["why?"], **WRITE, on_token=tokens.append)
    assert len(tokens) == 29
    assert ran == [1] * 29


def test_what_fails_ahead_is_asked_for_again(model, ran, monkeypatch):
    [want], run = model.run(["why?"], **WRITE), TorchRuntime.run

    def scarce(self, program, inputs, *others):
        if program.startswith("decode") and isinstance(inputs[0], torch.Tensor):
            raise MemoryError("full")
        return run(self, program, inputs, *others)

    monkeypatch.setattr(TorchRuntime, "run", scarce)
    ran.clear()
    assert model.run(["why?"], **WRITE) == [want]
    assert ran == [1] * 29
