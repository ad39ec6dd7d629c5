"""The guided step against the official formulas, one request after another and without rows or padding."""

import pytest
import torch

from bagel_opt.options import RENORM_TYPES
from bagel_opt.programs.guidance import GuidedStep

ROWS, BATCHES, TOKENS, CHANNELS = 3, 2, 7, 8
POISON = 1e4  # what padding and rows that take no part hold


def official(v, u_text, u_img, s_text, s_img, kind, least):
    """Of one request's real tokens [n, channels], as the official code has it."""

    def rescaled(new, **dims):
        ratio = torch.norm(v, **dims) / (torch.norm(new, **dims) + 1e-8)
        return new * ratio.clamp(min=least, max=1.0)

    if s_text <= 1.0:
        return v
    v_text = u_text + s_text * (v - u_text)
    if kind == "text_channel":
        v_text = rescaled(v_text, dim=-1, keepdim=True)
    v_new = u_img + s_img * (v_text - u_img) if s_img > 1.0 else v_text
    if kind == "channel":
        v_new = rescaled(v_new, dim=-1, keepdim=True)
    return rescaled(v_new) if kind == "global" else v_new


def step(requests, seed=0):
    """Runs one call. requests: dicts of rows (cond, text, img), n, s_text, s_img, kind, least, dt and, if wanted, v of rows.
    -> latents and velocities before, then after, of all rows of both batches."""
    generator, total = torch.Generator().manual_seed(seed), ROWS * BATCHES
    x, v = (torch.full((total, TOKENS, CHANNELS), sign * POISON) for sign in (1.0, -1.0))
    branch = {name: torch.arange(total) for name in ("cond", "text", "img")}
    number = {name: torch.zeros(total) for name in ("s_text", "s_img", "least", "dt")}
    renorm, n = torch.zeros(total, dtype=torch.long), torch.zeros(total, dtype=torch.long)
    for r in requests:
        latents = torch.randn(r["n"], CHANNELS, generator=generator)
        for row in set(r["rows"]):
            x[row, : r["n"]] = latents
            v[row, : r["n"]] = torch.randn(r["n"], CHANNELS, generator=generator)
            for name, of in zip(branch, r["rows"], strict=True):
                branch[name][row] = of
            for name, values in number.items():
                values[row] = r[name]
            renorm[row], n[row] = RENORM_TYPES.index(r["kind"]), r["n"]
        for row, values in r.get("v", {}).items():
            v[row, : r["n"]] = values(v[r["rows"][0], : r["n"]])
    numbers = (number["s_text"], number["s_img"], number["least"], renorm, number["dt"], n)
    out = GuidedStep()(*branch.values(), *numbers, *x.split(ROWS), *v.split(ROWS))
    assert [tuple(tensor.shape) for tensor in out] == [(ROWS, TOKENS, CHANNELS)] * 2 * BATCHES
    return x, v, torch.cat(out[:BATCHES]), torch.cat(out[BATCHES:])


def check(requests, before, v, x_new, v_new):
    """Every row of a request takes its step, its padding and all other rows stay as they were."""
    others = set(range(len(before)))
    for r in requests:
        cond, text, img = (v[row, : r["n"]] for row in r["rows"])
        want = official(cond, text, img, r["s_text"], r["s_img"], r["kind"], r["least"])
        for row in set(r["rows"]):
            real = slice(r["n"])
            torch.testing.assert_close(v_new[row, real], want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(x_new[row, real], before[row, real] - want * r["dt"], rtol=1e-5, atol=1e-6)
            assert torch.equal(x_new[row, r["n"] :], before[row, r["n"] :])
            others.discard(row)
    for row in others:
        assert torch.equal(x_new[row], before[row])


def request(rows, kind, s_text=4.0, s_img=1.5, least=0.0, n=5, dt=0.1, **more):
    return {"rows": rows, "kind": kind, "s_text": s_text, "s_img": s_img, "least": least, "n": n, "dt": dt, **more}


@pytest.mark.parametrize("kind", RENORM_TYPES)
@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("s_text", "s_img"), [(4.0, 1.5), (4.0, 3.0), (1.01, 1.01)])
def test_each_renorm_type_by_itself(kind, least, s_text, s_img):
    requests = [request((0, 3, 5), kind, s_text, s_img, least)]
    check(requests, *step(requests))


@pytest.mark.parametrize("kind", RENORM_TYPES)
@pytest.mark.parametrize("s_img", [0.0, 0.5, 1.0])
def test_without_guidance_by_the_picture(kind, s_img):
    """Whatever its row holds, which may be the main one."""
    for img in (0, 5):
        requests = [request((0, 3, img), kind, s_img=s_img, least=0.5)]
        x, v, x_new, v_new = step(requests)
        check(requests, x, v, x_new, v_new)
        v[5] = 0
        alone = official(v[0, :5], v[3, :5], v[5, :5], 4.0, s_img, kind, 0.5)
        torch.testing.assert_close(v_new[0, :5], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", RENORM_TYPES)
@pytest.mark.parametrize("s_text", [0.0, 0.5, 1.0])
def test_without_guidance_by_the_text_there_is_none(kind, s_text):
    """Not by the picture either, whose scale is above 1."""
    requests = [request((1, 4, 2), kind, s_text, s_img=3.0)]
    x, v, x_new, v_new = step(requests)
    check(requests, x, v, x_new, v_new)
    for row in (1, 4, 2):
        assert torch.equal(v_new[row, :5], v[1, :5])


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_velocities_are_made_shorter_never_longer(kind):
    """With text velocities beyond the main ones the guided velocity is shorter than they, and stays so."""
    shorter = request((0, 1, 0), kind, s_text=2.0, s_img=1.0, v={1: lambda cond: 1.5 * cond})
    x, v, x_new, v_new = step([shorter])
    check([shorter], x, v, x_new, v_new)
    torch.testing.assert_close(v_new[0, :5], 0.5 * v[0, :5], rtol=1e-5, atol=1e-6)
    longer = request((0, 1, 0), kind, s_text=2.0, s_img=1.0, v={1: lambda cond: -cond})
    for least, share in ((0.0, 1.0), (0.5, 1.5), (1.0, 3.0)):  # of a guided velocity three times the main one
        x, v, x_new, v_new = step([{**longer, "least": least}])
        torch.testing.assert_close(v_new[0, :5], share * v[0, :5], rtol=1e-5, atol=1e-6)


def test_the_types_differ_where_they_should():
    """Else comparing each with its formula would say little."""
    found = {kind: step([request((0, 1, 2), kind)])[3][0, :5] for kind in RENORM_TYPES}
    for one, other in (("global", "channel"), ("channel", "text_channel"), ("global", "text_channel")):
        assert (found[one] - found[other]).abs().max() > 0.05


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_requests_of_all_types_in_one_call(order):
    """Of other sizes, scales and times, over both batches, beside a row that takes no part."""
    kinds = [RENORM_TYPES[place] for place in order]
    requests = [
        request((0, 4, 2), kinds[0], s_text=4.0, s_img=1.5, least=0.0, n=7, dt=0.1),
        request((3, 1, 3), kinds[1], s_text=2.5, s_img=1.0, least=0.5, n=3, dt=0.02),
        request((5, 5, 5), kinds[2], s_text=0.0, s_img=2.0, least=1.0, n=1, dt=0.3),
    ]
    check(requests, *step(requests))
    # and each as it is alone
    together = step(requests[:2])[3]
    assert torch.equal(step(requests[:1])[3][0], together[0])


def test_a_row_without_tokens_stays_as_it_is():
    requests = [request((0, 1, 2), "global")]
    x, _, x_new, v_new = step(requests)
    for row in (3, 4, 5):
        assert torch.equal(x_new[row], x[row])
        assert not v_new[row].any()
