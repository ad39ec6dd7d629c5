"""TeaCache: when it evaluates, what it reuses, and that it leaves guidance, neighbours and later requests alone."""

import numpy as np
import pytest
import torch
from support import CHECKPOINT, cases, relative

import bagel_opt
from bagel_opt import Profile
from bagel_opt.sampling import calls, step_caches
from bagel_opt.sampling.step_caches import Drift

PICTURE = {"num_timesteps": 30, "height": 64, "width": 96, "seed": 3}
CACHED = {**PICTURE, "step_cache": "teacache"}


def watched(model, inputs="a red circle", **options):
    """The steps' velocities, and the picture."""
    seen = []
    (picture,) = model.run(inputs, on_step=seen.append, **options)
    return [event.v_t for event in seen], np.asarray(picture)


@pytest.fixture
def programs(eager, monkeypatch):
    """Programs that the eager model runs, with their inputs and outputs."""
    run, seen = eager.runtime.run, []

    def recorded(program, inputs, *rest):
        outputs = run(program, inputs, *rest)
        kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        seen.append((program, kept, [x.clone() for x in outputs]))
        return outputs

    monkeypatch.setattr(eager.runtime, "run", recorded)
    return seen


def test_it_evaluates_where_the_input_has_drifted_the_first_and_the_last():
    tea = Drift(8)
    assert [tea.due(change, 2) for change in (9, 0.02, 0.02, 0.02, 0.02, 0.04, 0.01, 0)] == [
        True, False, False, True, False, True, False, True,
    ]  # fmt: skip
    tea = Drift(9)  # guidance comes: its branches have nothing to reuse; when it goes, main still has
    assert [tea.due(0.005, branches) for branches in (1, 1, 3, 3, 1, 1, 3, 3, 1)] == [
        True, False, True, False, False, False, False, False, True,
    ]  # fmt: skip
    assert Drift(3).due(float("nan"), 1)  # whatever the row held before


def test_steps_between_reuse_what_the_last_evaluation_added(eager, programs):
    velocities, _ = watched(eager, cfg_text_scale=1.0, **CACHED)
    model, added, evaluated = eager.runtime.model, None, 0
    with torch.no_grad():
        for program, inputs, outputs in programs:
            if program == "tea_change":
                x, t, index, n, before = (torch.as_tensor(value) for value in inputs)
                embedded = model.latent_in(x) + model.time(t, x.dtype)[:, None] + model.latent_position(index)
                change = (embedded - before)[0, :24].abs().mean() / before[0, :24].abs().mean()
                assert n.tolist() == [24]
                if evaluated:
                    assert outputs[0][0].item() == pytest.approx(change.item(), rel=1e-4)
            elif program.startswith("generate"):
                added, evaluated = outputs[1] - embedded, evaluated + 1
            elif program == "tea_apply":
                want = model.latent_out(model.llm.norm_gen(embedded + added))[0, :24]
                assert relative(velocities.pop(0), want) < 1e-5
    assert velocities == []
    assert 2 < evaluated < 26


@pytest.mark.parametrize("case", [case for case in cases() if case.name in ("text_to_image", "image_editing")], ids=str)
def test_without_skipping_it_is_the_plain_picture(eager, monkeypatch, case):
    """With both guidances, in their interval."""
    monkeypatch.setattr(step_caches, "MOST_CHANGE", 0.0)
    plain, cached = (watched(eager, case.inputs, **case.options, step_cache=kind)[0] for kind in (None, "teacache"))
    assert all(relative(a, b) < 1e-5 for a, b in zip(cached, plain, strict=True))


def test_runtimes_agree_and_keep_no_state(load):
    found = []
    for backend in ("eager", "onnx", "export"):
        model = load(CHECKPOINT, backend)
        before = watched(model, **PICTURE)
        velocities, picture = watched(model, **CACHED)
        after = watched(model, **PICTURE)
        assert np.array_equal(before[1], after[1])
        assert 1e-3 < relative(velocities[-1], before[0][-1]) < 0.5
        found.append((velocities, picture))
    for velocities, picture in found[1:]:
        assert all(relative(a, b) < 1e-4 for a, b in zip(velocities, found[0][0], strict=True))
        assert np.abs(picture.astype(int) - found[0][1]).max() <= 1


@pytest.mark.parametrize(
    ("rows", "call"),
    [
        *[(None, 0), (1, 0), ("export", 0), ("export", 1e18)],
        *(pytest.param(rows, 0, marks=pytest.mark.second) for rows in (2, 3)),
    ],
)
def test_together_as_alone(load, eager, monkeypatch, rows, call):
    """Beside requests that are evaluated in each step, that TaylorSeer predicts, and of other lengths; in one batch, or in
    several of few rows; where rows are computed one by one, and where a call costs so much that all are."""
    monkeypatch.setattr(calls, "CALL", call)
    monkeypatch.setattr(calls, "READ", 0)
    together = eager
    if rows == "export":
        together = load(CHECKPOINT, "export")
    elif rows:
        profiles = [Profile("rows", rows, 768, 64, 64, 64)]
        together = bagel_opt.Model(eager.runtime, eager.config, eager.tokenizer, profiles)
    picture = next(case for case in cases() if case.name == "image_editing").inputs[0]
    kinds = [
        (["a red circle"], CACHED),
        (["a red circle"], PICTURE),
        (["a ring"], {**CACHED, "cfg_interval": (0.2, 0.7), "width": 48}),
        ([picture, "make it green"], {"num_timesteps": 12, "seed": 1, "step_cache": "teacache"}),
        (["a ring"], {**PICTURE, "step_cache": "taylorseer"}),
        (["overflows"], {**CACHED, "noise": np.full((24, 64), 3e38, np.float32)}),
    ]
    requests = [bagel_opt.Request(inputs, **options) for inputs, options in kinds]
    *answers, overflow = together.run_many(requests, return_exceptions=True)
    assert isinstance(overflow, FloatingPointError)
    for (inputs, options), (got,) in zip(kinds[:-1], answers, strict=True):
        (want,) = eager.run(inputs, **options)
        assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
