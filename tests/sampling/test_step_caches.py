"""Step caches take rows out of a step and bring their velocities, and leave all other rows alone."""

from types import SimpleNamespace

import numpy as np
import pytest
from bundles import SMALL
from support import CHECKPOINT

from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.options import STEP_CACHES as NAMES
from bagel_opt.programs.signatures import REUSE, STORE
from bagel_opt.sampling.batches import Batches, Context
from bagel_opt.sampling.flow_rows import FlowRows
from bagel_opt.sampling.step_caches import STEP_CACHES, TaylorSeer, TeaCache

ROWS = SMALL.rows * SMALL.batches


class Recorder:
    """A runtime that keeps what it is asked to run."""

    adapters = None

    def __init__(self):
        self.ran = []
        self.change = np.zeros(SMALL.rows, np.float32)

    def zeros(self, shape, hidden=False):
        return np.zeros(shape, np.float32)

    def host(self, tensor):
        return tensor

    def run(self, program, inputs):
        self.ran.append((program, [np.array(x) for x in inputs]))
        if program == "tea_change":
            return self.change, np.full_like(inputs[-1], 7.0)
        return [f"new {program}"] if program.startswith("taylor") else ("added", "new velocity")


@pytest.fixture
def batches():
    found = Batches(Recorder(), Checkpoint(CHECKPOINT).config, SMALL)
    for batch in found.every:
        batch.x = found.zeros()
    return found


def job(*numbers, steps=20):
    contexts = [Context(*divmod(row, SMALL.rows)) for row in numbers]
    return SimpleNamespace(
        drawn_from=contexts,
        main=contexts[0],
        branches=lambda: contexts,
        places=np.arange(4),
        remembered=None,
        clean=0,
        plan=SimpleNamespace(steps=range(steps)),
        want=SimpleNamespace(t=0.5),
    )


def step(cache, batches, *jobs):
    """One flow step up to its evaluation: which rows are left to evaluate."""
    rows = FlowRows(batches, np.zeros(ROWS, np.int64))
    rows.evaluated[:] = rows.t[:] = rows.index[:, 0] = 9
    cache.before(rows, list(jobs))
    assert np.array_equal(rows.evaluated, rows.t)
    assert np.array_equal(rows.evaluated, rows.index[:, 0])
    return np.flatnonzero(rows.evaluated).tolist()


def test_there_is_one_for_each_name():
    assert tuple(STEP_CACHES) == NAMES


def test_taylorseer_takes_out_predicted_rows_and_no_others(batches):
    cache, mine = TaylorSeer(batches), job(1, 2)
    seen = [step(cache, batches, mine) for _ in range(8)]
    assert seen == [[0, 1, 2, 3]] * 5 + [[0, 3]] * 2 + [[0, 1, 2, 3]]


def test_taylorseer_counts_each_request_by_itself(batches):
    cache, first, second = TaylorSeer(batches), job(0), job(3)
    for _ in range(5):
        step(cache, batches, first)
    assert step(cache, batches, first, second) == [1, 2, 3]
    assert first.remembered.keys().isdisjoint(second.remembered)


def test_taylorseer_remembers_and_predicts_where_it_is_due(batches):
    cache, mine = TaylorSeer(batches), job(1)
    step(cache, batches, mine)
    assert [cache.remembers(batch) for batch in (0, 1)] == [True, False]
    assert cache.after(0, "velocity", "hidden") == "velocity"  # evaluated in full
    [(program, inputs)] = batches.runtime.ran
    assert program == "taylor_update"
    assert inputs[1].tolist() == [-1, 0]  # the neighbour keeps what it has
    for _ in range(5):
        step(cache, batches, mine)
    batches.runtime.ran.clear()
    assert not cache.remembers(0)
    assert cache.after(0, "velocity", None) == "new taylor_predict"
    [(program, inputs)] = batches.runtime.ran
    assert (program, inputs[0].tolist()) == ("taylor_predict", [0, 1])
    assert cache.after(1, "velocity", None) == "velocity"  # nobody there


def test_teacache_takes_out_rows_whose_input_changes_little(batches):
    cache, mine = TeaCache(batches), job(0, 1)
    assert step(cache, batches, mine) == [0, 1, 2, 3]
    assert (cache.what.tolist(), cache.remembers(0), cache.remembers(1)) == ([STORE, STORE, 0, 0], True, False)
    assert step(cache, batches, mine) == [2, 3]
    assert (cache.what.tolist(), cache.remembers(0)) == ([REUSE, REUSE, 0, 0], False)
    batches.runtime.change[:] = 1.0
    assert step(cache, batches, mine) == [0, 1, 2, 3]


def test_teacache_measures_the_change_of_its_own_rows_alone(batches):
    cache, mine = TeaCache(batches), job(1, 0)
    step(cache, batches, mine)
    [(program, (_, t, index, n, before))] = batches.runtime.ran
    assert (program, t.tolist(), n.tolist()) == ("tea_change", [0.5, 0.5], [4, 4])
    assert index[1, :4].tolist() == [0, 1, 2, 3]
    assert not before.any()
    step(cache, batches, mine)
    assert (batches.runtime.ran[-1][1][-1] == 7).all()  # against the step before
    batches.runtime.change[:] = [1.0, 0.0]  # what counts is the main row's
    assert step(cache, batches, mine) == [2, 3]


def test_teacache_brings_velocities_where_rows_use_it(batches):
    cache = TeaCache(batches)
    step(cache, batches, job(0))
    assert cache.after(1, "velocity", "hidden") == "velocity"
    assert cache.after(0, "velocity", "hidden") == "new velocity"
    assert cache.added[0] == "added"


def test_nothing_remembered_is_shared_between_engines(batches):
    one, other = TeaCache(batches), TeaCache(batches)
    step(one, batches, job(0))
    assert other.embedded == [None] * SMALL.batches
