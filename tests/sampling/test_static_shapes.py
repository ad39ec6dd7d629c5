"""Padding, capacity, batch neighbours and what unused slots hold must not change an answer."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import CHECKPOINT, Poisoned, cases, check_together, draw_profile, examples, relative

import bagel_opt
from bagel_opt import Profile, ProfileError
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling.plan import fit_profile
from bagel_opt.sampling.planning import make_plan

ALL = cases()


@pytest.fixture(scope="module")
def alone(eager):
    """Every case by itself in exactly fitting shapes: outputs and events."""
    found = []
    for case in ALL:
        events = []
        found.append((eager.run(case.inputs, on_step=events.append, **case.options), events))
    return found


@examples(50)
@given(st.data())
def test_shapes_neighbours_and_garbage_change_nothing(eager, alone, data):
    chosen = data.draw(st.lists(st.integers(0, len(ALL) - 1), min_size=1, max_size=5))
    events = [[] for _ in chosen]
    requests = [ALL[i].request(on_step=seen.append) for i, seen in zip(chosen, events, strict=True)]
    plans = [make_plan(request, eager.config, eager.tokenizer) for request in requests]
    profile = draw_profile(data, fit_profile(plans, round_up=False))
    runtime = Poisoned(prepare(eager.runtime.model))
    model = bagel_opt.Model(runtime, eager.config, eager.tokenizer, [profile])
    for i, outputs, seen in zip(chosen, model.run_many(requests), events, strict=True):
        for got, want in zip(outputs, alone[i][0], strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
        for got, want in zip(seen, alone[i][1], strict=True):
            assert relative(got.v_t, want.v_t) < 1e-5


def test_a_thought_is_safe_from_others_that_draw(eager):
    """A picture in progress writes behind every row: it once overwrote a thought that was written but not counted."""
    chosen = [
        next(c for c in ALL if c.name == n) for n in ("taylorseer", "text_to_image_channel", "text_to_image_think")
    ]
    model = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("test", 8, 700, 16, 64, 64))
    for case, outputs in zip(chosen, model.run_many([case.request() for case in chosen]), strict=True):
        case.check_outputs(outputs)


@pytest.mark.parametrize("rows", [1, *(pytest.param(rows, marks=pytest.mark.second) for rows in (2, 3)), 8])
def test_all_together_in_few_and_many_rows(eager, rows):
    profile = Profile("test", rows, 768, 64, 64, 64)
    check_together(eager, bagel_opt.load(CHECKPOINT, device="cpu", profile=profile))


def test_capacity_is_used_to_the_last_slot(eager):
    """The smallest profile that `check` admits gives the right answer; one slot fewer is refused."""
    case = next(c for c in ALL if c.name == "image_editing")
    plan = make_plan(case.request(), eager.config, eager.tokenizer)
    text, patches, latents = 16, 64, 64
    need = plan.peak(text, patches, latents)[1]
    fits = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("fits", 3, need, text, patches, latents))
    case.check_outputs(fits.run(case.inputs, **case.options))
    small = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("small", 3, need - 1, text, patches, latents))
    with pytest.raises(ProfileError, match=f"slots of at least {need}.*slots = {need - 1}"):
        small.run(case.inputs, **case.options)


def test_text_stops_where_the_profile_ends(eager):
    """Without max_think_tokens a text may be as long as there is room; asked for more, the request is refused."""
    case, written = next(c for c in ALL if c.name == "text_only"), []
    short = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("short", 1, 100, 16, 1, 1))
    options = {name: value for name, value in case.options.items() if name != "max_think_tokens"}
    short.run(case.inputs, on_token=written.append, **options)
    expected = []
    eager.run(case.inputs, on_token=expected.append, **{**options, "max_think_tokens": 100 - 14})
    assert written == expected
    assert len(written) == 100 - 14 - 1  # the start token counts
    with pytest.raises(ProfileError, match="slots"):
        short.run(case.inputs, **{**options, "max_think_tokens": 100 - 13})


def test_requests_too_large_to_share_wait_for_each_other(eager):
    """Slots for either request, not for both beside each other: they run one after the other."""
    pair = [next(c for c in ALL if c.name == name) for name in ("image_understanding", "text_to_image")]
    plans = [make_plan(case.request(), eager.config, eager.tokenizer) for case in pair]
    slots = max(plan.peak(16, 64, 64)[1] for plan in plans)
    model = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("tight", 8, slots, 16, 64, 64))
    for case, outputs in zip(pair, model.run_many([case.request() for case in pair]), strict=True):
        case.check_outputs(outputs)


def test_a_thought_longer_than_the_profile_is_refused_and_alone(eager):
    thinks, plain = (next(c for c in ALL if c.name == n) for n in ("text_to_image_think", "text_to_image"))
    plan = make_plan(thinks.request(), eager.config, eager.tokenizer)
    slots = plan.peak(16, 64, 64)[1]  # the thought's broken characters come back as more ids than were generated
    model = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("tight", 3, slots, 16, 64, 64))
    failed, outputs = model.run_many([thinks.request(), plain.request()], return_exceptions=True)
    assert isinstance(failed, ProfileError)
    assert "thought" in str(failed)
    plain.check_outputs(outputs)


def test_a_failing_callback_loses_nobody_elses_work(eager):
    def fail(event):
        raise RuntimeError("mine")

    case = next(c for c in ALL if c.name == "text_to_image")
    failed, outputs = eager.run_many([case.request(on_step=fail), case.request()], return_exceptions=True)
    assert str(failed) == "mine"
    case.check_outputs(outputs)
    with pytest.raises(RuntimeError, match="mine"):
        eager.run_many([case.request(), case.request(on_step=fail)])


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_an_overflow_stays_with_its_request(load, backend):
    """Infinities in a row's cache or latents would reach the row's next request as 0 * inf."""
    case = next(c for c in ALL if c.name == "text_to_image")
    model = load(CHECKPOINT, backend)
    huge = bagel_opt.Request(["b"], noise=np.full((64, 64), 3e38, np.float32), num_timesteps=3)
    failed, *others = model.run_many([huge, *[case.request() for _ in range(4)]], return_exceptions=True)
    assert isinstance(failed, FloatingPointError)
    for outputs in others:
        case.check_outputs(outputs)


def test_threads_share_a_model(eager):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda case: eager.run(case.inputs, **case.options), ALL * 2))
    for case, outputs in zip(ALL * 2, answers, strict=True):
        case.check_outputs(outputs)


def test_a_failed_allocation_loses_nobody_elses_work(eager):
    class Small(TorchRuntime):
        left = 1

        def caches(self, rows, slots):
            self.left -= 1
            if self.left < 0:
                raise MemoryError("no room")
            return super().caches(rows, slots)

    case = next(c for c in ALL if c.name == "text_to_image_no_cfg")  # one row
    runtime = Small(prepare(eager.runtime.model))
    model = bagel_opt.Model(runtime, eager.config, eager.tokenizer, [Profile("rows", 1, 300, 64, 64, 64)])
    outputs, failed = model.run_many([case.request(), case.request()], return_exceptions=True)
    case.check_outputs(outputs)
    assert isinstance(failed, MemoryError)
