"""What the first rank makes of a failure that another one tells of, which is here the other end of a pipe."""

import tempfile
import time
from multiprocessing import Pipe

import pytest

from bagel_opt.runtime import members
from bagel_opt.runtime.calls import Answer
from bagel_opt.runtime.members import Members


@pytest.fixture
def other(monkeypatch):
    monkeypatch.setattr(members, "SETTLING", 0.5)
    mine, its = Pipe()
    first = Members([mine], [], tempfile.TemporaryDirectory())
    yield first, its
    first.close()


@pytest.mark.parametrize(("gathers", "alike"), [(3, True), (2, False), (None, False)])
def test_ranks_fail_alike_where_they_gathered_as_much(other, gathers, alike):
    """None: the other has not failed."""
    first, its = other
    first.calling = (5, time.monotonic())
    if gathers is not None:
        its.send(Answer(5, False, gathers, ("ValueError", "bad")))
    first.done(5, 3)
    assert first.fail_alike(5) == alike


@pytest.mark.parametrize(("gathers", "lost"), [(3, False), (2, True)])
def test_one_that_failed_before_others_had_its_part_ends_the_model(other, gathers, lost):
    first, its = other
    first.done(5, 3)
    its.send(Answer(5, False, gathers, ("ValueError", "bad")))
    time.sleep(1)
    assert bool(first.failed) == lost
    if lost:
        assert "rank 1 failed alone (bad): requests on their way are lost" in str(first.failed)


def test_the_first_does_not_wait_for_one_that_failed(other):
    first, its = other
    first.calling = (5, time.monotonic())
    its.send(Answer(5, False, 0, ("ValueError", "bad")))
    with pytest.raises(ChildProcessError, match="rank 1 failed alone"):
        first.wait_for(6, 5)
