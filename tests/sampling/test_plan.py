"""A plan that is fitted to a profile is a new one."""

import dataclasses

import pytest
from bundles import SMALL
from support import CHECKPOINT

from bagel_opt import ProfileError, Request
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.options import DEFAULT_TOKENS
from bagel_opt.sampling.plan import LEAST_TOKENS, fits
from bagel_opt.sampling.planning import make_plan


@pytest.fixture(scope="module")
def plan():
    checkpoint = Checkpoint(CHECKPOINT)
    return lambda inputs, **options: make_plan(Request(inputs, **options), checkpoint.config, checkpoint.tokenizer)


def test_the_old_plan_stays_as_it_was(plan):
    old = plan("a cat", output="text")
    before = {field.name: getattr(old, field.name) for field in dataclasses.fields(old)}
    new = old.fitted(SMALL)
    assert new is not old
    assert LEAST_TOKENS <= new.max_tokens < DEFAULT_TOKENS == old.max_tokens
    assert {field.name: getattr(old, field.name) for field in dataclasses.fields(old)} == before
    changed = {name for name, value in before.items() if getattr(new, name) is not value}
    assert changed == {"max_tokens"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        old.max_tokens = 3


def test_it_takes_all_the_room_that_there_is(plan):
    old = plan("a cat", output="text")
    new = old.fitted(SMALL)
    assert new.peak(SMALL.text, SMALL.patches, SMALL.latents)[1] == SMALL.slots
    assert dataclasses.replace(new, max_tokens=new.max_tokens + 1).peak(16, 16, 16)[1] == SMALL.slots + 1
    assert old.fitted(dataclasses.replace(SMALL, slots=SMALL.slots + 5)).max_tokens == new.max_tokens + 5


def test_one_that_fits_is_the_plan_itself(plan):
    old = plan("a cat", output="text", max_think_tokens=20)
    assert old.fitted(SMALL).max_tokens == 20


def test_a_length_that_was_asked_for_is_not_shortened(plan):
    old = plan("a cat", output="text", max_think_tokens=900)
    with pytest.raises(ProfileError, match="slots of at least"):
        old.fitted(SMALL)
    assert not fits(old, SMALL)
    assert old.max_tokens == 900


def test_fewer_than_the_least_tokens_do_not_fit(plan):
    with pytest.raises(ProfileError, match="slots of at least"):
        plan("a cat " * 60, output="text").fitted(SMALL)
