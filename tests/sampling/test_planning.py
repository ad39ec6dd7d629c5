"""What a request makes the model read: its contexts, their lengths, its pictures' sizes and its noise."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from support import CHECKPOINT

from bagel_opt import Profile, ProfileError, Request
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.sampling.planning import THINK_IMAGE, THINK_TEXT, make_plan

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def plan(checkpoint):
    return lambda inputs, **options: make_plan(Request(inputs, **options), checkpoint.config, checkpoint.tokenizer)


SQUARE = Image.new("RGB", (64, 64))  # 4 x 4 latent tokens, 5 x 5 ViT patches
WIDE = Image.new("RGB", (128, 64))


def kinds(blocks, checkpoint):
    """Blocks for reading: the texts, and the kinds and numbers of the others."""
    return [checkpoint.tokenizer.decode(list(b.ids)) if b.kind == "text" else f"{b.kind}{b.image}" for b in blocks]


@pytest.mark.parametrize(
    ("inputs", "options", "main", "cfg_text", "cfg_img"),
    [
        (["a"], {}, ["a"], [], ["a"]),
        (["a", "b"], {}, ["a", "b"], ["a"], ["a", "b"]),
        ([SQUARE, "a"], {}, ["vae0", "vit0", "a"], ["vae0", "vit0"], ["a"]),
        (["a", SQUARE], {}, ["a", "vae0", "vit0"], ["a", "vae0", "vit0"], ["a"]),
        (
            ["a", SQUARE, "b", WIDE, "c"],
            {},
            ["a", "vae0", "vit0", "b", "vae1", "vit1", "c"],
            ["a", "vae0", "vit0", "b", "vae1", "vit1"],
            ["a", "b", "c"],
        ),
        (["a"], {"think": True}, [THINK_IMAGE, "a"], [THINK_IMAGE], [THINK_IMAGE, "a"]),
        (["a"], {"cfg_img_scale": 1}, ["a"], [], None),
        (["a"], {"cfg_text_scale": 1}, ["a"], None, None),
        (["a"], {"cfg_interval": (0, 0)}, ["a"], None, None),
        ([SQUARE, "a"], {"output": "text"}, ["vit0", "a"], None, None),
        (["a"], {"output": "text", "think": True}, [THINK_TEXT, "a"], None, None),
        # prompts of the user's own
        ([SQUARE, "a"], {"system_prompt": "s"}, ["s", "vae0", "vit0", "a"], ["s", "vae0", "vit0"], ["s", "a"]),
        (
            ["a"],
            {"system_prompt": "s", "think": True},
            ["s", THINK_IMAGE, "a"],
            ["s", THINK_IMAGE],
            ["s", THINK_IMAGE, "a"],
        ),
        (["a"], {"think_prompt": "t", "think": True}, ["t", "a"], ["t"], ["t", "a"]),
        (["a"], {"think_prompt": "", "think": True}, ["a"], [], ["a"]),
        (["a"], {"think_prompt": "t"}, ["a"], [], ["a"]),
        (["a"], {"think_prompt": "t", "think": True, "output": "text"}, ["t", "a"], None, None),
        (["a"], {"system_prompt": ""}, ["a"], [], ["a"]),
        # a negative prompt takes the place of the last text
        (["a"], {"negative_prompt": "no"}, ["a"], ["no"], ["a"]),
        (["a"], {"negative_prompt": ""}, ["a"], [""], ["a"]),
        (["a", "b"], {"negative_prompt": "no"}, ["a", "b"], ["a", "no"], ["a", "b"]),
        (["a", "a"], {"negative_prompt": "no"}, ["a", "a"], ["a", "no"], ["a", "a"]),
        ([SQUARE, "a"], {"negative_prompt": "no"}, ["vae0", "vit0", "a"], ["vae0", "vit0", "no"], ["a"]),
        (["a", SQUARE], {"negative_prompt": "no"}, ["a", "vae0", "vit0"], ["no", "vae0", "vit0"], ["a"]),
        ([SQUARE], {"negative_prompt": "no"}, ["vae0", "vit0"], ["vae0", "vit0", "no"], []),
        (["a"], {"negative_prompt": "no", "think": True}, [THINK_IMAGE, "a"], [THINK_IMAGE, "no"], [THINK_IMAGE, "a"]),
    ],
)
def test_contexts(plan, checkpoint, inputs, options, main, cfg_text, cfg_img):
    p = plan(inputs, **options)
    assert kinds(p.main, checkpoint) == main
    for blocks, want in ((p.cfg_text, cfg_text), (p.cfg_img, cfg_img)):
        assert (None if blocks is None else kinds(blocks, checkpoint)) == want


@pytest.mark.parametrize(
    ("options", "size", "vae", "vit"),
    [
        ({}, (64, 64), (4, 4), (5, 5)),
        ({"vit_min_size": 98}, (64, 64), (4, 4), (7, 7)),
        ({"vit_max_size": 42}, (64, 64), (4, 4), (3, 3)),
        ({"vae_min_size": 96}, (96, 96), (6, 6), (7, 7)),  # the ViT's picture is made from it
        ({"vae_max_size": 48}, (48, 48), (3, 3), (3, 3)),
        ({"vae_min_size": 96, "vit_max_size": 28}, (96, 96), (6, 6), (2, 2)),
    ],
)
def test_sides_of_the_resize_rule(plan, options, size, vae, vit):
    p = plan([SQUARE, "a"], **options)
    assert (p.images[0].size, p.images[0].vae_grid, p.images[0].vit_grid, p.canvas.grid) == (size, vae, vit, vae)


def test_sides_beyond_the_tables(plan):
    with pytest.raises(ValueError, match=r"inputs\[0\]: 256x256 pixels .* 16x16 tokens, .* 8x8 position table"):
        plan([SQUARE, "a"], vae_min_size=256, vae_max_size=256)


@pytest.mark.parametrize(
    ("inputs", "options", "rows"),
    [
        (["a"], {}, 2),
        (["a"], {"think": True}, 3),  # a thought joins the main context alone
        (["a"], {"cfg_text_scale": 1}, 1),
        (["a"], {"cfg_text_scale": 0.5, "cfg_img_scale": 3}, 1),
        (["a"], {"cfg_interval": (0, 0)}, 1),
        (["a"], {"cfg_interval": (0.998, 0.999)}, 1),  # between two steps
        (["a"], {"cfg_interval": (0.998, 1)}, 2),
        (["a"], {"negative_prompt": "a"}, 1),
        (["a"], {"negative_prompt": "b"}, 2),
        ([SQUARE, "a"], {}, 3),
        ([SQUARE, "a"], {"cfg_img_scale": 1}, 2),
        ([SQUARE, "a"], {"cfg_text_scale": 1}, 1),
        (["a", SQUARE], {}, 2),  # without a text after the image, cfg_text is the main context
        ([SQUARE], {}, 2),
        (["a", SQUARE, "b"], {"think": True}, 3),
        (["a"], {"output": "text"}, 1),
        ([SQUARE, "a"], {"output": "text", "think": True}, 1),
    ],
)
def test_rows(plan, inputs, options, rows):
    assert plan(inputs, **options).contexts() == rows


def test_lengths(plan):
    p = plan([SQUARE, "a cat"])
    assert [b.length for b in p.main] == [16 + 2, 25 + 2, len(p.main[2].ids)]
    assert (p.canvas.grid, p.images[0].vae_grid, p.images[0].vit_grid) == ((4, 4), (4, 4), (5, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 65}, "height=65; allowed: a multiple of 16 pixels"),
        ({"width": 8}, "width=8; allowed: a multiple of 16 pixels"),
        ({"height": 144}, r"height, width: 144x128 pixels .* 9x8 tokens, .* 8x8 position table; at most 128 pixels"),
        ({"width": 4096, "height": 16}, "height, width: 16x4096 pixels .* at most 128 pixels"),
    ],
)
def test_size_of_the_picture(plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan("a", **options)


def test_default_sizes(plan):
    assert plan("a").canvas.grid == (8, 8)  # as far as the table reaches
    assert plan("a", height=32).canvas.grid == (2, 8)
    assert plan([WIDE, SQUARE, "a"]).canvas.grid == (4, 4)  # the last input image's


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, (4, 8)),
        ({"height": 128, "width": 32}, (8, 2)),
        ({"height": 32}, (2, 8)),
        ({"width": 48}, (4, 3)),
        ({"cfg_text_scale": 1, "height": 16}, (1, 8)),
    ],
)
def test_an_edit_at_a_chosen_size(plan, options, grid):
    """The input is read as ever."""
    p, alone = plan([SQUARE, WIDE, "a"], **options, seed=1), plan([SQUARE, WIDE, "a"])
    assert (p.canvas.grid, p.noise.shape, p.resized) == (grid, (grid[0] * grid[1], 64), None)
    assert p.main == alone.main
    assert p.latents() == max(grid[0] * grid[1], 32)


def test_sizes_of_an_edit_that_are_refused(plan):
    for options, message in (
        ({"height": 60}, "height=60; allowed: a multiple of 16 pixels"),
        ({"width": 144}, "64x144 pixels .* at most 128 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            plan([SQUARE, "a"], **options)


@pytest.mark.parametrize("size", [(50, 70), (64, 64), (333, 100), (1, 150)])
def test_the_size_that_an_input_came_in(plan, size):
    image = Image.new("RGB", size)
    p = plan([WIDE, image, "a"], size="input")
    assert (p.resized, p.canvas.grid) == (size[::-1], plan([image, "a"]).canvas.grid)
    assert plan([WIDE, image, "a"], size="input", height=32, width=32).canvas.grid == (2, 2)  # what is drawn
    assert plan([WIDE, image, "a"]).resized is None


def test_the_size_of_an_input_that_is_not_there(plan):
    with pytest.raises(ValueError, match="size='input'; allowed only with an input picture"):
        plan("a", size="input")
    plan([SQUARE, "a"], size="input", output="text")  # as height: nothing is drawn
    with pytest.raises(ValueError, match="size='input'; an interleaved request's pictures are as they are drawn"):
        Request([SQUARE, "a"], size="input", output="interleaved")


def test_image_beyond_the_tables(checkpoint):
    config = dataclasses.replace(checkpoint.config, latent_side=3)
    with pytest.raises(ValueError, match=r"inputs\[1\]: 64x64 pixels .* 4x4 tokens, .* 3x3 position table"):
        make_plan(Request(["a", SQUARE]), config, checkpoint.tokenizer)


def test_fewest_steps(plan):
    (step,) = plan("a", num_timesteps=2).steps
    assert (step.t, step.dt, step.guided) == (1.0, 1.0, True)


def test_seed(plan):
    one, again, other = (plan("a", seed=seed).noise for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(plan("a").noise, plan("a").noise)
    assert one.shape == (64, 64)
    torch.manual_seed(1)
    assert np.array_equal(one, torch.randn(64, 64).numpy())  # what the official code draws on a CPU
    edit = plan([SQUARE, WIDE, "a"], seed=1)
    assert [noise.shape for noise in edit.vae_noise] == [(1, 16, 8, 8), (1, 16, 8, 16)]


@pytest.mark.parametrize("convert", [np.asarray, np.float64, torch.from_numpy], ids=["array", "double", "torch"])
def test_given_noise(plan, convert):
    noise, vae_noise = np.random.default_rng(0).standard_normal((2, 16, 64), np.float32)
    p = plan([SQUARE, "a"], noise=convert(noise), vae_noise=convert(vae_noise.reshape(1, 16, 8, 8)))
    assert np.array_equal(p.noise, noise)
    assert np.array_equal(p.vae_noise[0].ravel(), vae_noise.ravel())


def test_given_noise_stays_the_callers(plan):
    noise = np.zeros((16, 64), np.float32)
    plan([SQUARE, "a"], noise=noise).noise[:] = 1
    assert not noise.any()


def holed(shape, value):
    array = np.zeros(shape, np.float32)
    array.flat[-1] = value
    return array


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": np.zeros((15, 64))}, r"noise has shape \[15, 64\]; allowed: \[16, 64\]"),
        ({"noise": torch.zeros(1, 16, 64)}, r"noise has shape \[1, 16, 64\]; allowed: \[16, 64\]"),
        ({"noise": 0.5}, r"noise has shape \[\]; allowed: \[16, 64\]"),
        ({"noise": "gauss"}, r"noise is str; allowed: numbers of shape \[16, 64\]"),
        ({"noise": [[1.0], [2.0, 3.0]]}, "noise is list; allowed: numbers"),
        ({"noise": holed((16, 64), NAN)}, "noise holds infinities or NaN; allowed: finite"),
        ({"noise": torch.full((16, 64), INF)}, "noise holds infinities or NaN"),
        ({"vae_noise": np.zeros((16, 8, 8))}, r"vae_noise\[0\] has shape \[16, 8, 8\]; allowed: \[1, 16, 8, 8\]"),
        ({"vae_noise": [np.zeros((1, 16, 8, 8))] * 2}, "vae_noise has 2 arrays; allowed: .* here 1"),
        ({"vae_noise": []}, "vae_noise has 0 arrays"),
        ({"vae_noise": [holed((1, 16, 8, 8), -INF)]}, r"vae_noise\[0\] holds infinities or NaN"),
    ],
)
def test_wrong_noise(plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan([SQUARE, "a"], **options)


def test_noise_for_no_image(plan):
    with pytest.raises(ValueError, match="vae_noise has 1 arrays; allowed: one per input image, here 0"):
        plan("a", vae_noise=torch.zeros(1, 16, 8, 8))


TINY = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (["a cat " * 30], {}),
        ([SQUARE, "a"], {}),
        (["a"], {"think": True, "max_think_tokens": 50}),
        ([SQUARE, "a"], {"output": "text", "max_think_tokens": 300}),
    ],
)
def test_profile_just_large_enough(plan, inputs, options):
    p = plan(inputs, **options)
    fits = dataclasses.replace(TINY, latents=p.latents() or 1, patches=p.tokens("vit") or 1, slots=9999)
    fits = dataclasses.replace(fits, slots=p.peak(fits.text, fits.patches, fits.latents)[1])
    assert p.fitted(fits).max_tokens == p.max_tokens
    needs = {"slots": fits.slots, "latents": p.latents(), "patches": p.tokens("vit")}
    for name, need in needs.items():
        if need > 1:
            with pytest.raises(ProfileError) as caught:
                p.fitted(dataclasses.replace(fits, **{name: need - 1}))
            assert f"needs {name} of at least {need}, but profile 'tiny' has {name} = {need - 1};" in str(caught.value)
