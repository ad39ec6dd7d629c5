"""What the model that ships must be able to do, on combinations that its training never saw."""

import numpy as np
import pytest

import bagel_opt
from bagel_opt.api import shipped_model
from bagel_opt.demo import evaluate

pytestmark = pytest.mark.skipif(
    shipped_model().parent.name != "demo", reason="the model is not trained yet: python -m bagel_opt.demo.train"
)
CASES = {"prompts": evaluate.prompts, "edits": evaluate.edits, "questions": evaluate.questions}
WANTED = {"prompts": 90, "edits": 51, "questions": 95}


@pytest.fixture(scope="module")
def eager():
    return bagel_opt.load(device="cpu")


@pytest.fixture(scope="module")
def onnx(load):
    return load(shipped_model(), "onnx")


@pytest.fixture(scope="module")
def right(eager):
    """How many of the cases come out right, each counted once."""
    known = {}

    def count(task, **options):
        key = task, *options.items()
        if key not in known:
            known[key] = sum(evaluate.right(eager, CASES[task](), **options))
        return known[key]

    return count


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("task", CASES)
def test_it_does_what_it_is_told(task, think, right):
    assert right(task, **({"think": True} if think else {})) >= WANTED[task]


@pytest.mark.parametrize("task", CASES)
def test_an_onnx_bundle_of_it_does_too(task, onnx):
    assert sum(evaluate.right(onnx, CASES[task]())) >= WANTED[task]


def test_together_it_gives_what_it_gives_alone(eager):
    cases = [case for make in CASES.values() for case in make(8)]
    requests = []
    for number, case in enumerate(cases):
        kind = {"output": "text"} if isinstance(case.wanted, str) else {"num_timesteps": 9, "seed": number}
        requests.append(bagel_opt.Request(case.inputs, think=number % 3 == 0, **kind))
    together = eager.run_many(requests)
    for request, outputs in zip(requests, together, strict=True):
        (alone,) = eager.run_many([request])
        for got, want in zip(outputs, alone, strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1


def test_guidance_is_worth_something(right):
    assert right("prompts") > right("prompts", cfg_text_scale=1.0)


def test_guidance_needs_branches_that_do_not_see_each_other(eager, right):
    with evaluate.branches_mixed():
        mixed = sum(evaluate.right(eager, evaluate.prompts(40), together=False))
    assert mixed / 40 < right("prompts") / 100 - 0.25


def test_taylorseer_keeps_most_of_it(right):
    assert evaluate.full_evaluations(24) == 11
    assert right("prompts", step_cache="taylorseer") >= 0.85 * right("prompts")
