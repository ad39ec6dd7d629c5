"""Where memory does not suffice for many rows, fewer go together, and only what does not fit alone ends."""

import dataclasses

import numpy as np
import pytest
from support import CHECKPOINT

from bagel_opt import Profile, Request
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

PROFILE = Profile("many", rows=5, slots=512, text=64, patches=64, latents=256)
SMALL = {"height": 64, "width": 64, "num_timesteps": 9}
WRITE = {"output": "text", "max_think_tokens": 12}
TEXTS = "why?", "a b c", "who is it that asks"


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "eager")


@pytest.fixture
def ran(model, monkeypatch):
    """Every call of a program: its name, and the rows that it was for. lacks(name, rows, caches): whether it has no memory."""
    found, run = [], type(model.runtime).run

    def limited(lacks):
        def noted(self, program, inputs, caches=(), rows=None):
            rows = rows if rows is None or isinstance(rows, slice) else slice(rows, rows + 1)
            found.append((program, rows))
            if lacks(program, rows, caches):
                raise MemoryError(f"no memory for {rows}")
            return run(self, program, inputs, caches, rows)

        monkeypatch.setattr(type(model.runtime), "run", noted)
        return found

    return limited


def results(model, requests):
    plans = [make_plan(request, model.config, model.tokenizer) for request in requests]
    return Engine(model.runtime, model.config, model.tokenizer, PROFILE).run(plans)


def several(rows):
    return rows is None or rows.stop - rows.start > 1


def alike(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize("lacking", [None, 1])
def test_tokens_are_chosen_one_by_one(model, ran, lacking):
    """lacking: a row that has too little memory even so."""
    alone = [model.run([text], **WRITE) for text in TEXTS]
    found = ran(lambda program, rows, _: program.startswith("decode") and (several(rows) or rows.start == lacking))
    got = results(model, [Request([text], **WRITE) for text in TEXTS])
    for number, (result, want) in enumerate(zip(got, alone, strict=True)):
        assert isinstance(result, MemoryError) if number == lacking else result == want
    tried = sum(program == "decode" for program, _ in found)
    assert 1 <= tried <= 3  # again where a request has ended, and not for each token


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("lacking", [None, 1, 2])
@pytest.mark.parametrize("cache", [None, "taylorseer", "teacache"])
@pytest.mark.parametrize("profile", [PROFILE, dataclasses.replace(PROFILE, rows=2)])
def test_rows_are_evaluated_one_by_one(model, ran, monkeypatch, free, lacking, cache, profile):
    """Two pictures with two branches each, in one batch or two. lacking: a row that has too little memory even so."""
    requests = [Request(["a red circle"], seed=seed, step_cache=cache, **SMALL) for seed in (1, 2)]
    alone = [model.run_many([request])[0][0] for request in requests]
    monkeypatch.setattr(model.runtime, "free_rows", free)
    plans = [make_plan(request, model.config, model.tokenizer) for request in requests]
    engine = Engine(model.runtime, model.config, model.tokenizer, profile)

    def lacks(program, rows, caches):
        if not program.startswith("generate"):
            return False
        batch = next(number for number, batch in enumerate(engine.batches.every) if batch.caches is caches)
        return several(rows) or lacking == batch * profile.rows + rows.start

    found = ran(lacks)
    for number, (result, want) in enumerate(zip(engine.run(plans), alone, strict=True)):
        if lacking is not None and number == lacking // 2:
            assert isinstance(result, MemoryError)
        else:
            assert alike(result[0], want)
    assert sum(program == "generate" and several(rows) for program, rows in found) <= 4


def test_rows_go_together_again_once_one_is_free(model, ran):
    """Another process may have taken the memory for a while."""
    lacks = [True]
    found = ran(lambda program, rows, _: program == "decode" and lacks and lacks.pop())
    short, *long = (
        Request([text], output="text", max_think_tokens=n) for text, n in zip(TEXTS, (3, 9, 9), strict=True)
    )
    results(model, [short, *long])
    together = [several(rows) for program, rows in found if program.startswith("decode")]
    assert together[0]
    assert not any(together[1:7])  # two tokens of each
    assert together[7:] == [True] * (len(together) - 7)
    assert len(together) > 7


class FewRows:
    """A runtime with memory for the caches of so many rows."""

    def __init__(self, runtime, most):
        self.runtime, self.most, self.taken, self.got = runtime, most, [], []

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def for_profile(self, profile):
        return self

    def caches(self, rows, slots):
        if sum(self.taken) + rows > self.most:
            raise MemoryError(f"no memory for {rows} rows")
        self.taken.append(rows)
        self.got.append(rows)
        return self.runtime.caches(rows, slots)

    def give_back(self, caches):
        self.taken.remove(len(caches[0]))
        self.runtime.give_back(caches)


@pytest.mark.parametrize(("most", "rows"), [(5, [5]), (4, [2, 2]), (3, [2]), (2, [2]), (1, [1])])
def test_fewer_rows_where_their_caches_do_not_fit(model, monkeypatch, most, rows):
    """The requests then take turns."""
    runtime = FewRows(model.runtime, most)
    requests = [Request([text], **WRITE) for text in (*TEXTS, "a", "b")]
    want = model.run_many(requests)
    monkeypatch.setattr(model, "runtime", runtime)
    assert model.run_many(requests) == want
    assert runtime.got == rows
    assert runtime.taken == []


def test_branches_have_room_before_a_request_begins(model, monkeypatch):
    """Of two pictures with two branches each one is drawn after the other."""
    runtime = FewRows(model.runtime, 2)
    monkeypatch.setattr(model, "runtime", runtime)
    request = Request(["a"], seed=1, **SMALL)
    [want] = Engine(runtime.runtime, model.config, model.tokenizer, PROFILE).run(
        [make_plan(request, model.config, model.tokenizer)]
    )
    [[got], [other]] = model.run_many([request, request])
    assert alike(got, want[0])
    assert alike(other, want[0])
    assert runtime.got == [2]


def test_a_single_request_takes_no_more_than_it_needs(model, monkeypatch):
    runtime = FewRows(model.runtime, 9)
    monkeypatch.setattr(model, "runtime", runtime)
    model.run(["a"], **WRITE)
    model.run(["a"], **SMALL)
    assert runtime.got == [1, 2]


def test_what_fits_nowhere_ends_by_itself(model, monkeypatch):
    monkeypatch.setattr(model, "runtime", FewRows(model.runtime, 0))
    found = model.run_many([Request([text], **WRITE) for text in TEXTS], return_exceptions=True)
    assert [str(error) for error in found] == ["no memory for 1 rows"] * 3
    assert all(isinstance(error, MemoryError) for error in found)
