"""What each row of all batches is given in a flow step."""

from types import SimpleNamespace

import numpy as np
import pytest
from bundles import SMALL
from support import CHECKPOINT

from bagel_opt import Options
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.sampling.batches import Batches, Context
from bagel_opt.sampling.contexts import DRAWN
from bagel_opt.sampling.flow import FlowStep
from bagel_opt.sampling.flow_rows import FlowRows

ROWS = SMALL.rows * SMALL.batches


@pytest.fixture(scope="module")
def batches():
    return Batches(SimpleNamespace(adapters=None), Checkpoint(CHECKPOINT).config, SMALL)


def job(contexts, places=(3, 1, 7), guided=True, t=0.75, **options):
    """A request in the rows of its contexts: main, cfg_text, cfg_img."""
    main, cfg_text, cfg_img = (Context(*divmod(row, SMALL.rows), position=row + 5) for row in contexts)
    own = [
        main,
        *([cfg_text] if contexts[1] != contexts[0] else []),
        *([cfg_img] if contexts[2] != contexts[0] else []),
    ]
    return SimpleNamespace(
        plan=SimpleNamespace(options=Options(**options)),
        want=FlowStep(t, 0.125, guided),
        drawn_from=own,
        main=main,
        cfg_text=cfg_text if contexts[1] != contexts[0] else main,
        cfg_img=cfg_img if contexts[2] != contexts[0] else main,
        places=np.array(places),
        share=np.zeros(0, np.float32),
        branches=lambda: own if guided else [main],
        target=lambda context: DRAWN,
        clean=0,
    )


def rows(batches):
    return FlowRows(batches, np.arange(ROWS) * 10)


def test_a_row_that_takes_no_part_is_its_own_only_branch_and_has_zeros(batches):
    found = rows(batches)
    found.add(job((1, 2, 1)))
    for row in (0, 3):
        assert (found.cond[row], found.text[row], found.img[row]) == (row, row, row)
        for name in ("text_scale", "img_scale", "renorm_min", "renorm", "dt", "t", "n", "evaluated"):
            assert getattr(found, name)[row] == 0, name
        assert not found.index[row].any()
    assert found.kv_len.tolist() == [0, 10, 20, 30]


def test_all_branches_of_a_request_take_the_same_step(batches):
    found = rows(batches)
    found.add(job((1, 2, 3), cfg_text_scale=3.0, cfg_img_scale=2.0, cfg_renorm_min=0.5, cfg_renorm_type="text_channel"))
    for row in (1, 2, 3):
        assert (found.cond[row], found.text[row], found.img[row]) == (1, 2, 3)
        step = found.text_scale[row], found.img_scale[row], found.renorm_min[row], found.renorm[row], found.dt[row]
        assert step == (3.0, 2.0, 0.5, 2, 0.125)
        assert (found.t[row], found.n[row], found.evaluated[row]) == (0.75, 3, 3)
        assert found.index[row].tolist() == [3, 1, 7] + [0] * (SMALL.latents - 3)


def test_without_guidance_the_main_row_alone_is_evaluated_and_all_step(batches):
    found = rows(batches)
    found.add(job((1, 2, 1), guided=False, cfg_text_scale=3.0))
    assert found.evaluated.tolist() == [0, 3, 0, 0]
    assert found.n.tolist() == [0, 3, 3, 0]
    assert found.dt.tolist() == [0, 0.125, 0.125, 0]
    assert not found.text_scale.any()
    assert not found.img_scale.any()


def test_a_skipped_row_is_not_evaluated_but_takes_its_step(batches):
    found, other = rows(batches), rows(batches)
    for one in (found, other):
        one.add(job((1, 2, 1)))
    found.skip(2)
    assert (found.t[2], found.evaluated[2], found.index[2].any()) == (0, 0, False)
    assert (found.t[1], found.evaluated[1], found.index[1].any()) == (0.75, 3, True)
    for skipped, plain in zip(found.guidance(), other.guidance(), strict=True):
        assert np.array_equal(skipped, plain)


def test_each_batch_is_given_its_own_rows(batches):
    found = rows(batches)
    found.add(job((1, 2, 1)))
    t, index, position, n, kv_len = found.evaluation(1)
    assert (t.tolist(), position.tolist(), n.tolist(), kv_len.tolist()) == ([0.75, 0], [7, 0], [3, 0], [20, 30])
    assert index.shape == (SMALL.rows, SMALL.latents)
    assert [array.shape for array in found.guidance()] == [(ROWS,)] * 9
