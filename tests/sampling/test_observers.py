"""Who watches requests, in place of what their options name."""

import threading

import bagel_opt
from bagel_opt.sampling.job import Observer

FEW = {"num_timesteps": 4, "height": 32, "width": 32, "seed": 0}


def request(inputs="a cat", **options):
    return bagel_opt.Request(inputs, **options)


def test_each_picture_is_told_once_that_denoising_begins_and_ends(eager):
    told, steps = {name: [] for name in ("one", "two", "text")}, []
    observers = [
        Observer(on_denoising=told["one"].append, on_step=lambda event: steps.append(list(told["one"]))),
        Observer(on_denoising=told["two"].append),
        Observer(on_denoising=told["text"].append),
    ]
    requests = [
        request(**FEW),
        request(**FEW, think=True, max_think_tokens=4),
        request(output="text", max_think_tokens=4),
    ]
    eager.run_many(requests, observers=observers)
    assert told == {"one": [True, False], "two": [True, False], "text": []}
    assert steps == [[True]] * 3  # the steps are between


def test_an_observer_takes_the_place_of_the_options(eager):
    own, others, events, tokens = [], [], [], []
    mine = request(**FEW, on_step=own.append, think=True, max_think_tokens=4, on_token=own.append)
    theirs = request(**FEW, on_step=others.append)
    eager.run_many([mine, theirs], observers=[Observer(on_step=events.append, on_token=tokens.append), None])
    assert own == []
    assert [event.index for event in events] == [0, 1, 2]
    assert tokens
    assert len(others) == 3  # None: what the options name


def test_observers_stay_with_their_requests_over_several_profiles(two):
    """Requests that one call sorts by the profile they fit."""
    model, told = bagel_opt.load(two), [[] for _ in range(4)]
    sides = (64, 128, 48, 128)
    requests = [request(height=side, width=side, num_timesteps=number + 2, seed=1) for number, side in enumerate(sides)]
    model.run_many(requests, observers=[Observer(on_step=seen.append) for seen in told])
    assert [len(seen) for seen in told] == [1, 2, 3, 4]
    assert [len(seen[0].x_t) for seen in told] == [(side // 16) ** 2 for side in sides]


def test_one_that_fails_ends_its_request_alone(eager):
    def fail(begins):
        raise RuntimeError(f"mine, in {threading.current_thread().name}")

    failed, outputs = eager.run_many(
        [request(**FEW), request(**FEW)], return_exceptions=True, observers=[Observer(on_denoising=fail), None]
    )
    assert str(failed).startswith("mine")
    assert len(outputs) == 1
