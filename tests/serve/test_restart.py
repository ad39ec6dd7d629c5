"""A fault of the engine itself: its requests fail, its memory goes back, and the next ones are served."""

import numpy as np
import pytest
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

PROFILE = Profile("small", rows=3, slots=160, text=16, patches=16, latents=16)
FEW = {"num_timesteps": 3, "height": 64, "width": 64, "seed": 1, "cfg_text_scale": 1.0}


class Counted:
    """A runtime that counts caches which are out."""

    def __init__(self, runtime):
        self.runtime, self.taken, self.returned = runtime, [], []

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def caches(self, rows, slots):
        self.taken.append(self.runtime.caches(rows, slots))
        return self.taken[-1]

    def give_back(self, caches):
        self.returned.append(caches)
        self.runtime.give_back(caches)


@pytest.fixture
def engine(eager):
    return Engine(Counted(eager.runtime), eager.config, eager.tokenizer, PROFILE)


def draw_to_the_end(engine):
    while engine.active or engine.waiting:
        engine.step()


def plan(eager):
    return make_plan(Request("a", **FEW), eager.config, eager.tokenizer)


def test_each_cache_that_was_taken_goes_back(eager, engine, monkeypatch):
    for count in range(1, 4):
        jobs = [engine.submit(plan(eager)) for _ in range(4)]  # three have rows, one waits
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_denoise", lambda jobs: 1)  # answers of a strange kind: a fault of the engine's own
            with pytest.raises(TypeError) as fault:
                draw_to_the_end(engine)
        ended = engine.restart(fault.value)
        assert set(ended) == set(jobs)
        assert all(job.result is fault.value for job in jobs)
        assert len(engine.runtime.taken) == len(engine.runtime.returned) == count
        assert engine.runtime.returned[-1] is engine.runtime.taken[-1]
        assert len(engine.batches.free) == PROFILE.rows * PROFILE.batches
    job = engine.submit(plan(eager))
    while not job.result:
        engine.step()
    want = bagel_opt.load(CHECKPOINT, device="cpu").run("a", **FEW)[0]
    assert np.abs(np.asarray(job.result[0]).astype(int) - np.asarray(want)).max() <= 1


def test_what_had_just_been_done_keeps_its_result(eager, engine, monkeypatch):
    job = engine.submit(plan(eager))
    while not job.result:
        engine.step()
    engine.finished.append(job)  # as where another request's fault comes before the round is over
    other = engine.submit(plan(eager))
    assert engine.restart(RuntimeError("fault")) == [job, other]
    assert not isinstance(job.result, Exception)
    assert str(other.result) == "fault"
