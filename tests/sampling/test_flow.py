"""The host side of the flow: its schedule, its noise, TaylorSeer's turns."""

import sys

import numpy as np
import pytest
import torch

from bagel_opt.sampling.flow import schedule, seeded_noise
from bagel_opt.sampling.step_caches import BranchSeer


@pytest.mark.parametrize("num_timesteps", [2, 3, 24, 25, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.37])
def test_schedule_is_torchs_to_the_last_bit(num_timesteps, shift):
    t = torch.linspace(1, 0, num_timesteps)
    t = shift * t / (1 + (shift - 1) * t)
    steps = schedule(num_timesteps, shift, (0.4, 1.0))
    assert [step.t for step in steps] == t[:-1].tolist()
    assert [step.dt for step in steps] == (t[:-1] - t[1:]).tolist()
    assert [step.guided for step in steps] == [bool(now > 0.4 and now <= 1.0) for now in t[:-1]]


def test_guidance_interval_is_open_below_and_closed_above():
    assert [step.guided for step in schedule(5, 1.0, (0.25, 0.75))] == [False, True, True, False]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 + 5, 2**63 - 1])
def test_noise_is_torchs(seed):
    shapes = [(48, 64), (1, 16, 3, 5), (17,), (6, 64)]
    torch.manual_seed(seed)
    for got, shape in zip(seeded_noise(seed, shapes), shapes, strict=True):
        assert np.array_equal(got, torch.randn(shape).numpy())


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 + 5, 2**63 - 1])
def test_noise_without_torch_is_the_same_to_rounding(seed, monkeypatch):
    shapes = [(48, 64), (1, 16, 3, 5), (17,), (6, 64)]
    want = seeded_noise(seed, shapes)
    monkeypatch.setitem(sys.modules, "torch", None)
    for got, expected in zip(seeded_noise(seed, shapes), want, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_no_seed_is_another_noise_each_time():
    assert not np.array_equal(seeded_noise(None, [(16,)])[0], seeded_noise(None, [(16,)])[0])


def test_taylorseer_evaluates_the_first_five_and_every_third():
    seer, full, stored = BranchSeer(), [], []
    for evaluation in range(24):
        if seer.next():
            full.append(evaluation)
            stored.append(seer.store())
        else:
            assert seer.distance == evaluation - full[-1]
    assert full == [0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22]
    differences, distances = zip(*stored, strict=True)
    assert differences == (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 6)
    assert distances == (0, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3)
