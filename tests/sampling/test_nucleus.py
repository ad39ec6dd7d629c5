"""Sampling from the likeliest tokens alone."""

import numpy as np
import pytest
import torch
from support import CHECKPOINT

from bagel_opt import Request
from bagel_opt.programs.choose_token import ChooseToken
from bagel_opt.sampling.nucleus import sample

UNIFORM = np.linspace(0, 1, 1001, dtype=np.float32)[:-1]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, {2}), (0.4, {2}), (0.41, {0, 2}), (0.7, {0, 2}), (0.71, {0, 1, 2}), (0.95, {0, 1, 2, 3}), (0.999, set(range(5)))],
)  # fmt: skip
def test_the_fewest_that_have_so_much(top_p, kept):
    """As often as each has of their probability; of 1 and 3, which are as likely, the first."""
    share = np.array([0.3, 0.125, 0.4, 0.125, 0.05])
    found = [sample(np.log(share, dtype=np.float32), 1.0, top_p, u) for u in UNIFORM]
    want = np.array([share[i] if i in kept else 0 for i in range(5)])
    assert np.abs(np.bincount(found, minlength=5) / len(found) - want / want.sum()).max() < 0.002
    assert set(found) == kept


def test_all_of_it_is_what_the_program_samples():
    logits = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    programs = ChooseToken()(torch.tensor(logits).expand(1000, -1), torch.full((1000,), 0.7), torch.tensor(UNIFORM))[0]
    own = np.array([sample(logits, 0.7, 1.0, u) for u in UNIFORM])
    assert np.mean(own == programs.numpy()) > 0.995  # sums are rounded otherwise


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_in_the_loop(load, backend):
    """In one batch with others, and when they are done, it is as alone; nothing of it concerns greedy texts."""
    model, options = load(CHECKPOINT, backend), {"output": "text", "max_think_tokens": 12, "seed": 3}
    sampled = options | {"do_sample": True, "text_temperature": 2.0}
    requests = [
        sampled | {"top_p": 0.0},
        options,
        options | {"top_p": 0.1},
        sampled | {"top_p": 0.8, "max_think_tokens": 24},
        sampled,
    ]
    found = [text for [text] in model.run_many([Request("hello", **request) for request in requests])]
    greedy, *_, narrow, wide = found
    assert found[:3] == [greedy] * 3
    assert len({greedy, narrow, wide}) == 3
    assert found == [model.run("hello", **request)[0] for request in requests]
