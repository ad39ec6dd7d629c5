"""Layer runners are composed: one that passes its calls on changes no answer."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from bundles import SMALL

from bagel_opt.model.transformer import run_layer
from bagel_opt.programs.callables import programs
from bagel_opt.programs.exercise import run_programs
from bagel_opt.programs.signatures import LAYERED, ONE_ROW, ROW, signatures
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare


@pytest.fixture(scope="module")
def prepared(eager):
    return prepare(eager.runtime.model)


def outcome(prepared, run):
    """Every program's outputs and caches, its layers by a runner."""
    runtime = TorchRuntime(dataclasses.replace(prepared, programs=programs(prepared.model, run)))
    return run_programs(runtime, prepared.model.config, SMALL)


def counted(inner, calls):
    def run(layer, *tensors):
        calls[layer] += 1
        return inner(layer, *tensors)

    return run


def test_a_runner_that_counts_and_passes_on_gives_the_same_answers(prepared):
    calls = [Counter(), Counter()]
    plain = outcome(prepared, run_layer)
    composed = outcome(prepared, counted(counted(run_layer, calls[0]), calls[1]))
    for (name, want), (_, got) in zip(plain, composed, strict=True):
        assert all(map(np.array_equal, got, want)), name
    layered = [name for name, _ in plain if name.removesuffix(ROW) in LAYERED]
    # each program ran every layer once, "generate_row" twice: for clean latents and for a flow step
    assert calls[0] == calls[1] == dict.fromkeys(prepared.model.llm.layers, len(layered))
    assert set(layered) == {*LAYERED, *(name + ROW for name in LAYERED if name in ONE_ROW)}


def test_what_a_runner_returns_is_what_the_program_uses(prepared):
    """One that leaves a layer out gives other answers, in all programs with layers and in no other."""

    def skipping(layer, und, gen, cos, sin, k, v, *rest):
        return (
            (und, gen, k, v)
            if layer is prepared.model.llm.layers[1]
            else run_layer(layer, und, gen, cos, sin, k, v, *rest)
        )

    pairs = zip(outcome(prepared, run_layer), outcome(prepared, skipping), strict=True)
    changed = {name for (name, want), (_, got) in pairs if not all(map(np.array_equal, got, want))}
    assert changed == {name for name in signatures(prepared.model.config, SMALL) if name.removesuffix(ROW) in LAYERED}
