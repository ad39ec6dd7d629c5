"""The autoencoder of videos, part by part."""

import pytest
import torch
from lance_cases import cases, loaded

from bagel_opt.lance.config import DEVIATIONS, MEANS

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def vae():
    return loaded().runtime.model.vae


@torch.no_grad()
def through(call, parts):
    """The first outputs, joined over frames."""
    found, state = [], None
    for part in parts:
        out, *rest = call(part, state)
        state = rest[1:] if call.__name__ == "decode" else rest
        found.append(out)
    return found


@pytest.mark.parametrize("cuts", [(4, 4, 4), (8, 4), (12,)])
def test_parts_of_any_length_are_encoded_alike(vae, cuts):
    pixels = torch.rand(1, 3, 13, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, rest = pixels.split((1, 12), dim=2)
    found = torch.cat(through(vae.encode, [first, *rest.split(cuts, dim=2)]), dim=1)
    whole = torch.cat(through(vae.encode, [first, rest]), dim=1)
    assert found.shape == (1, 4, 3, 4, 96)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 1), (1, 2)])
def test_parts_of_any_length_are_decoded_alike(vae, cuts):
    latent = torch.randn(1, 48, 4, 3, 4, generator=torch.Generator().manual_seed(0))
    first, rest = latent.split((1, 3), dim=2)
    found = torch.cat(through(vae.decode, [first, *rest.split(cuts, dim=2)]))
    whole = torch.cat(through(vae.decode, [first, rest]))
    assert found.shape == (13, 48, 64, 3)
    assert (found.int() - whole.int()).abs().max() <= 1
    assert (found != whole).float().mean() < 1e-3


def test_a_frame_changes_none_before_it(vae):
    """And does change those after it, across the border of its part."""
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = pixels.clone()
    other[:, :, 4] += 0.5  # the last frame of the second part
    first, second = (torch.cat(through(vae.encode, x.split((1, 4, 4), dim=2)), dim=1) for x in (pixels, other))
    changed = (first - second).abs().amax((0, 2, 3, 4))
    assert changed[0] == 0
    assert (changed[1:] > 1e-4).all()


@pytest.mark.parametrize("name", ["i2v", "image_edit", "video_edit"])
def test_moments_are_the_official_ones(vae, name):
    tensors = CASES[name].tensors
    pixels = tensors["vae_encode.0.pixels"][None]
    parts = [pixels[:, :, :1], *(pixels[:, :, 1:].split(4, dim=2) if pixels.shape[2] > 1 else ())]
    moments = torch.cat(through(vae.encode, parts), 1)
    mean, log_variance = moments[0].chunk(2, dim=-1)
    torch.testing.assert_close(log_variance, tensors["vae_encode.0.log_var"], rtol=1e-4, atol=1e-4)
    scaled = (mean - torch.tensor(MEANS)) / torch.tensor(DEVIATIONS)
    torch.testing.assert_close(scaled, tensors["vae_encode.0.mean"], rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_shows(vae):
    latent = torch.zeros(1, 48, 1, 2, 2)
    latent[0, 3, 0, 1, 1] = torch.nan
    with torch.no_grad():
        _, finite, *_ = vae.decode(latent)
    assert finite.tolist() == [0]
