"""Where the host's memory is full, what does not fit ends with a MemoryError that says what to do, alone."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from random_checkpoint import make
from support import CHECKPOINT, forked

import bagel_opt
from bagel_opt import Request
from bagel_opt.cli.console import guarded
from bagel_opt.runtime import groups, member
from bagel_opt.runtime.calls import Answer
from bagel_opt.runtime.members import failure

TOO_MUCH = 2**50
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits a process as Linux does")


def with_little(call, megabytes):
    """What a call returns, in this process, which gets no more memory than so much meanwhile."""
    status = Path("/proc/self/status").read_text()
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def check(call, *arguments):
    done = forked(call, *arguments)
    assert done.returncode == 0, done.stderr


def draw_one_that_is_too_large(folder):
    model = bagel_opt.load(folder, device="cpu")
    large, small = (Request(["a"], height=side, width=side, num_timesteps=3, seed=1) for side in (512, 64))
    want = np.asarray(model.run_many([small])[0][0], int)
    failed, drawn = with_little(lambda: model.run_many([large, small], return_exceptions=True), 50)
    assert isinstance(failed, MemoryError)
    assert str(failed) == (
        "the host's memory is full (program 'vae_decode'); use a smaller height and width or fewer requests at a time, or "
        "load with quantization=, --quantization, and the weights take less"
    )
    assert np.abs(np.asarray(drawn[0]) - want).max() <= 1
    model.run_many([large, small])


@LINUX
def test_a_picture_that_is_too_large(tmp_path):
    check(draw_one_that_is_too_large, make(tmp_path / "checkpoint", latent_side=32, vae_ch_mult=(1, 1, 1, 1)))


def write_with_room_for_one():
    model = bagel_opt.load(CHECKPOINT, device="cpu")
    requests = [Request([text], output="text", max_think_tokens=600_000, stop=["a"]) for text in ("a", "b")]
    want, taken, caches = [model.run_many([request])[0] for request in requests], [], model.runtime.caches
    one = sum(cache.nbytes for cache in caches(1, 600_000)) // 2**20
    assert one > 90  # so that what earlier tests left in this process has no room for it
    model.runtime.caches = lambda rows, slots: taken.append(rows) or caches(rows, slots)
    assert with_little(lambda: model.run_many(requests), one + one // 2) == want
    assert taken == [2, 1, 1]  # for both, which failed; then for one after the other, of which the second failed
    [failed] = with_little(lambda: model.run_many(requests[:1], return_exceptions=True), one // 2)
    assert isinstance(failed, MemoryError)
    assert "the host's memory is full (caches)" in str(failed)


@LINUX
def test_requests_that_have_no_room_together_take_turns():
    check(write_with_room_for_one)


def load_with(folder, megabytes):
    def load():
        with pytest.raises(
            MemoryError, match="the host has no memory left for the weights; load with quantization='int8'"
        ):
            bagel_opt.load(folder, device="cpu")

    with_little(load, megabytes)


@LINUX
def test_weights_that_have_no_room(tmp_path):
    """Of the file the largest tensor takes 36 MB. What earlier tests left in this process has no room for a file that is mapped."""
    check(load_with, make(tmp_path / "checkpoint", vocab=40_000), 16)


def test_a_bundle_whose_weights_have_no_room(load, monkeypatch):
    def fails(*given):
        torch.empty(TOO_MUCH)

    folder = load(CHECKPOINT, "export").runtime.folder
    monkeypatch.setattr("bagel_opt.runtime.torch_bundle.PackagedRuntime", fails)
    with pytest.raises(MemoryError, match="no memory left for the weights; export the bundle with quantization"):
        bagel_opt.load(folder)


def test_a_rank_does_not_try_again_while_others_wait():
    group = groups.Group(dist.HashStore(), [0], 0, torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"the host's memory is full \(program 'decode'\)"), group.once("decode"):
        torch.empty(TOO_MUCH)
    with pytest.raises(RuntimeError, match="other"), group.once("decode"):
        raise RuntimeError("another fault, an other")
    group.rehearsing = True
    with pytest.raises(RuntimeError, match="can't allocate"), group.once("decode"):
        torch.empty(TOO_MUCH)


def test_what_other_ranks_lack():
    """NumPy's MemoryError is a kind of its own."""
    with pytest.raises(MemoryError) as numpys:
        np.zeros(TOO_MUCH)
    told = failure(1, Answer(3, error=member.told(numpys.value)))
    assert isinstance(told, MemoryError)
    assert "rank 1: Unable to allocate" in str(told)


def fail_on_another_rank():
    raise failure(1, Answer(3, error=("MemoryError", "Unable to allocate")))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: torch.empty(TOO_MUCH), "can't allocate memory: you tried to allocate"),
        (lambda: np.zeros(TOO_MUCH), "Unable to allocate 8.00 PiB"),
        (fail_on_another_rank, "rank 1: Unable to allocate"),
    ],
)
def test_what_libraries_say_has_what_to_do_after_it_on_the_command_line(call, said, capsys):
    assert guarded(call) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.count("; use a smaller picture") == 1
