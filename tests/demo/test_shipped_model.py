"""What the model that ships must be able to do, on combinations that its training never saw."""

import numpy as np
import pytest

import bagel_opt
from bagel_opt.demo import evaluate
from bagel_opt.loading import shipped_model

CASES = {"prompts": evaluate.prompts, "edits": evaluate.edits, "questions": evaluate.questions}
MANY = {"prompts": 40, "edits": 24, "questions": 60}  # `python -m bagel_opt.demo.evaluate` takes more
WANTED = {"prompts": 0.9, "edits": 0.85, "questions": 0.95}  # shares


@pytest.fixture(scope="module")
def eager(load):
    return load(shipped_model(), "eager")


@pytest.fixture(scope="module")
def counts(thorough):
    """How many cases of each task, the first ones; and the prompts that are drawn in other ways."""
    return {**MANY, "other ways": 40} if thorough else {"prompts": 10, "edits": 7, "questions": 20, "other ways": 8}


@pytest.fixture(scope="module")
def right(eager, counts):
    """Which of the cases come out right, each found out once."""
    known = {}

    def count(task, **options):
        key = task, *options.items()
        if key not in known:
            known[key] = evaluate.right(eager, CASES[task](counts["other ways" if options else task]), **options)
        return known[key]

    return count


@pytest.mark.parametrize("task", CASES)
def test_it_does_what_it_is_told(task, right):
    assert sum(right(task)) >= WANTED[task] * len(right(task))


@pytest.mark.parametrize("task", CASES)
def test_it_does_so_when_it_thinks_first(task, eager, right, thorough):
    count = 6 if thorough else 2
    got = evaluate.right(eager, CASES[task](count), **evaluate.THINK)
    assert sum(got) >= sum(right(task)[:count]) - 1


@pytest.mark.second  # exporting this model takes longest of all that is exported
@pytest.mark.parametrize("task", CASES)
def test_onnx_runtime_does_too(task, load, right):
    """What others do, the golden cases show."""
    count = 6
    got = evaluate.right(load(shipped_model(), "onnx"), CASES[task](count))
    assert sum(got) >= sum(right(task)[:count]) - 1


def test_together_it_gives_what_it_gives_alone(eager, thorough):
    cases = [case for make in CASES.values() for case in make(4 if thorough else 2)]
    requests = []
    for number, case in enumerate(cases):
        kind = {"output": "text"} if isinstance(case.wanted, str) else {"num_timesteps": 5, "seed": number}
        requests.append(bagel_opt.Request(case.inputs, think=number % 3 == 0, **kind))
    together = eager.run_many(requests)
    for request, outputs in zip(requests, together, strict=True):
        (alone,) = eager.run_many([request])
        for got, want in zip(outputs, alone, strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1


TOLD = range(20, 30)  # of the prompts; the first 20 come right without guidance, and with branches that see each other


@pytest.fixture
def again(eager):
    """How many of those prompts come out right, each with the seed that it has among all."""

    def count(**options):
        prompts = evaluate.prompts(TOLD.stop)
        return sum(evaluate.right(eager, [prompts[seed]], seed=seed, **options)[0] for seed in TOLD)

    return count


@pytest.mark.second
def test_guidance_is_worth_something(again, right):
    assert again(cfg_text_scale=1.0) < sum(right("prompts")[TOLD.start : TOLD.stop])


@pytest.mark.second
def test_guidance_needs_branches_that_do_not_see_each_other(again, eager, right):
    with evaluate.branches_mixed(eager):
        mixed = again()
    assert mixed <= sum(right("prompts")[TOLD.start : TOLD.stop]) - 2


def test_taylorseer_keeps_most_of_it(right):
    assert evaluate.full_evaluations(24) == 11
    got = right("prompts", step_cache="taylorseer")
    assert sum(got) >= 0.75 * sum(right("prompts")[: len(got)])


def test_teacache_keeps_it(eager, right, thorough):
    count = 12 if thorough else 4
    with evaluate.tea_steps() as seen:
        got = evaluate.right(eager, CASES["prompts"](count), step_cache="teacache")
    assert sum(got) >= 0.9 * sum(right("prompts")[:count])
    assert len(seen) == count * 24
    assert count * 8 < sum(seen) < count * 20
