"""Rows of different lengths in as few operations as may be."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ODD, examples

from bagel_opt import Profile, Request
from bagel_opt.sampling import calls
from bagel_opt.sampling.calls import CALL, READ, neighbours, parts
from bagel_opt.sampling.engine import Engine
from bagel_opt.sampling.planning import make_plan

ROWS = st.sets(st.integers(0, 7), min_size=1, max_size=6).map(sorted)


def cost(found, token):
    return sum(CALL + token * (READ + (part.stop - part.start) * (size + 2)) for part, size in found)


def every_way(rows, sizes):
    """All ways to cut rows into runs of neighbours."""
    for cuts in itertools.product((False, True), repeat=len(rows) - 1):
        found = [[0]]
        for number, cut in enumerate(cuts, 1):
            if cut:
                found.append([])
            found[-1].append(number)
        if all(rows[run[-1]] - rows[run[0]] == run[-1] - run[0] for run in found):
            yield [(slice(rows[run[0]], rows[run[-1]] + 1), max(sizes[i] for i in run)) for run in found]


@given(rows=ROWS, data=st.data(), token=st.sampled_from([1e6, 1e8, 1e10]))
@examples(100)
def test_the_cheapest_of_all_ways(rows, data, token):
    sizes = [data.draw(st.sampled_from([64, 128, 1024, 4096])) for _ in rows]
    found = parts(rows, sizes, 8, True, token)
    assert [row for part, _ in found for row in range(part.start, part.stop)] == rows
    assert cost(found, token) == pytest.approx(min(cost(way, token) for way in every_way(rows, sizes)))


def test_small_pictures_beside_a_large_one_do_not_grow():
    large, small = 4096, 1024
    assert parts([0, 1, 2, 3, 4], [large] * 3 + [small] * 2, 32, True, 1e10) == [
        (slice(0, 3), large),
        (slice(3, 5), small),
    ]
    assert parts([0, 1], [1024, 1088], 32, True, 1e10) == [(slice(0, 2), 1088)]  # for which the weights are read once


def test_one_row_or_all_where_there_are_no_others():
    assert parts([0, 2], [4096, 64], 3, False, 1e10) == [(slice(0, 1), 4096), (slice(2, 3), 64)]
    assert parts([0, 2], [64, 64], 3, False, 1e6) == [(slice(0, 3), 64)]
    assert parts([0, 1, 2], [64, 64, 64], 3, False, 1e10) == [(slice(0, 3), 64)]
    assert parts([0], [64], 1, False, 1e10) == [(slice(0, 1), 64)]


def test_neighbours():
    assert neighbours([0, 1, 3, 5, 6]) == [slice(0, 2), slice(3, 4), slice(5, 7)]


def test_pictures_of_two_sizes_are_drawn_in_calls_of_their_own(load, monkeypatch):
    """And are what they are alone."""
    model, seen = load(ODD / "checkpoint", "eager"), []
    side, options = model.config.token_pixels, {"num_timesteps": 4, "seed": 1}
    asked = [
        Request(["a red circle"], height=height * side, width=10 * side, cfg_text_scale=scale, **options)
        for height, scale in ((2, 4.0), (8, 4.0), (2, 1.0))
    ]
    alone = [model.run_many([request])[0] for request in asked]
    profile, run = Profile("many", rows=6, slots=512, text=64, patches=64, latents=144), type(model.runtime).run
    monkeypatch.setattr(calls, "CALL", 0)
    monkeypatch.setattr(calls, "READ", 1)

    def noted(self, program, inputs, *given):
        if program.startswith("generate"):
            seen.append(tuple(inputs[0].shape[:2]))
        return run(self, program, inputs, *given)

    monkeypatch.setattr(type(model.runtime), "run", noted)
    plans = [make_plan(request, model.config, model.tokenizer) for request in asked]
    together = Engine(model.runtime, model.config, model.tokenizer, profile).run(plans)
    assert seen[:3] == [(2, 64), (2, 128), (1, 64)]
    for (got,), (want,) in zip(together, alone, strict=True):
        assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
