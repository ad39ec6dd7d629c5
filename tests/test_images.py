"""Pictures on the host: the resize rule, PIL modes, pixels and tokens."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bagel_opt import Request, images
from bagel_opt.config import ResizeConfig

VAE = ResizeConfig(max_size=1024, min_size=512, stride=16)  # the published limits
VIT = ResizeConfig(max_size=980, min_size=224, stride=14)
TINY = ResizeConfig(max_size=128, min_size=32, stride=16)
LARGE = ResizeConfig(max_size=4096, min_size=512, stride=16)  # where the limit on pixels is what counts
LIMITS = pytest.mark.parametrize("limits", [VAE, VIT, TINY, LARGE], ids=["vae", "vit", "tiny", "large"])

SIZES = st.integers(1, 5000)
GREY, RED = (119, 119, 119), (255, 0, 0)


# ---- the resize rule


def official_size(width, height, limits):
    """The official rule, step by step: shrink until the longest side fits, but rather enlarge until the shortest
    does; round to the stride; then shrink by the ratio of the areas where there are too many pixels; then by the
    longest side once more."""
    most = 14 * 14 * 9 * 1024

    def times(scale):
        sides = []
        for side in (width, height):
            scaled = round(side * scale)
            sides.append(max(limits.stride, int(round(scaled / limits.stride) * limits.stride)))
        return sides

    scale = limits.max_size / max(width, height)
    scale = min(scale, 1.0)
    scale = max(scale, limits.min_size / min(width, height))
    width, height = times(scale)
    if width * height > most:
        width, height = times(most / (width * height))
    if max(width, height) > limits.max_size:
        width, height = times(limits.max_size / max(width, height))
    return width, height


@LIMITS
def test_resize_rule_on_many_sizes(limits):
    sides = [1, 7, 13, 14, 16, 31, 100, 223, 224, 500, 511, 512, 513, 640, 777, 979, 980, 1023, 1024, 1025, 1999, 4000]
    for width, height in itertools.product(sides, sides):
        assert images.resized((width, height), limits) == official_size(width, height, limits)


@LIMITS
@given(width=SIZES, height=SIZES)
def test_resize_rule(limits, width, height):
    got = images.resized((width, height), limits)
    assert got == official_size(width, height, limits)
    assert all(side % limits.stride == 0 and limits.stride <= side <= limits.max_size for side in got)
    assert images.resized((height, width), limits) == got[::-1]


@pytest.mark.parametrize(
    ("size", "limits", "want"),
    [
        ((1024, 1024), VAE, (1024, 1024)),
        ((1024, 1024), VIT, (980, 980)),
        ((1920, 1080), VAE, (1024, 576)),
        ((1024, 576), VIT, (980, 546)),  # 551.25 pixels are 551, and 39.36 strides 39
        ((100, 100), VAE, (512, 512)),
        ((640, 480), VAE, (688, 512)),  # 682.67 pixels are 683, and 42.7 strides 43
        ((640, 480), VIT, (644, 476)),
        ((100, 3000), VAE, (32, 1024)),
        ((8, 24), VAE, (336, 1024)),
    ],
)
def test_resized_sizes(size, limits, want):
    assert images.resized(size, limits) == want


def test_resize():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    assert images.resize(image, TINY) is image  # nothing to do
    got = images.resize(image.resize((200, 90)), TINY)
    assert got.size == (128, 64)
    assert np.array_equal(got, image.resize((200, 90)).resize((128, 64), Image.Resampling.BICUBIC))


# ---- PIL modes


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode(mode):
    got = images.to_rgb(Image.new(mode, (3, 2)))
    assert (got.mode, got.size) == ("RGB", (3, 2))
    assert images.pixels(got).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "want"),
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 119, GREY),
        ("LA", (119, 255), GREY),
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (119, 255), GREY),
        ("La", (0, 51), (204, 204, 204)),
        ("I", 119, GREY),
        ("I", 119 * 257, GREY),  # a number above 255, so white is 65535
        *[(mode, 119 * 257 + off, GREY) for mode in ("I;16", "I;16L", "I;16B", "I;16N") for off in (-128, 128)],
        ("I;16", 128, (0, 0, 0)),
        ("F", 119.0, GREY),
        ("F", 119 / 255, GREY),
        ("F", 1.0, (255, 255, 255)),
        ("RGB", RED, RED),
        ("RGBX", (*RED, 7), RED),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("RGBA", (*RED, 51), (255, 204, 204)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),  # red times its opacity
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), RED),
        ("LAB", (128, 128, 128), GREY),  # L* = 50 without colour
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ],
)
def test_known_colours(mode, colour, want):
    got = images.to_rgb(Image.new(mode, (2, 2), colour)).getpixel((1, 1))
    assert np.abs(np.subtract(got, want)).max() <= (1 if mode == "LAB" else 0)


@pytest.mark.parametrize(
    ("transparency", "want"),
    [(None, RED), (1, (255, 255, 255)), (0, RED), (b"\x00\xff", RED), (b"\xff\x33", (255, 204, 204))],
)
def test_palette(transparency, want):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 255, *RED])
    if transparency is not None:
        image.info["transparency"] = transparency
    assert images.to_rgb(image).getpixel((0, 0)) == want


def test_palette_with_alpha():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 255, *RED])
    assert images.to_rgb(image.convert("PA")).getpixel((0, 0)) == RED
    image.info["transparency"] = 1
    assert images.to_rgb(image.convert("PA")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("fill", [{"I": -1}, {"I": 65536}, {"F": 255.5}, {"F": -0.1}, {"F": float("nan")}])
def test_numbers_of_which_none_is_known_to_be_white(fill):
    [(mode, number)] = fill.items()
    image = Image.new(mode, (2, 2), 1)
    image.putpixel((1, 0), number)
    with pytest.raises(ValueError, match=rf"its mode {mode} holds numbers from .*; allowed: 0 to (1|255) or 0 to"):
        images.to_rgb(image)


def test_files_of_16_bits(tmp_path):
    """A ramp over all shades, in the formats that have them; PGM's are read into mode I."""
    ramp = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tif", "a.jp2"):
        Image.fromarray(ramp).save(tmp_path / name)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.jp2", "a.pgm"):
        got = np.asarray(images.to_rgb(images.open_picture(tmp_path / name, "here")))
        assert np.array_equal(got, np.arange(256).reshape(16, 16, 1).repeat(3, 2)), name


@pytest.mark.parametrize(("mode", "colour"), [("1", 0), ("L", 9), ("I;16", 9), ("I;16", 40000), ("RGB", (9, 9, 9))])
def test_transparent_colour(tmp_path, mode, colour):
    """A PNG without alpha may still call one colour transparent."""
    Image.new(mode, (2, 2), colour).save(tmp_path / "a.png", transparency=colour)
    image = Image.open(tmp_path / "a.png")
    assert image.info["transparency"] == colour
    assert images.to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    image.info["transparency"] = 1 if mode == "1" else (*colour[:2], 1) if mode == "RGB" else 1
    assert images.to_rgb(image).getpixel((0, 0)) != (255, 255, 255)


def test_the_original_stays():
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    images.to_rgb(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (*RED, 0))


# ---- pixels, tokens, positions


def test_pixels():
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 0]]], np.uint8))
    want_CHW = [[[-1, 1]], [[-0.6, -1]], [[1, -1]]]
    got = images.pixels(image)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want_CHW, atol=1e-6)


SIDES = st.integers(1, 6)


@given(channels=st.integers(1, 4), height=SIDES, width=SIDES, patch=SIDES, seed=st.integers(0, 99))
def test_tokens_and_back(channels, height, width, patch, seed):
    shape = (channels, height * patch, width * patch)
    array = np.random.default_rng(seed).standard_normal(shape, np.float32)
    cut = images.tokens(array, patch)
    assert cut.shape == (height * width, patch * patch * channels)
    assert np.array_equal(images.untokens(cut, height, width, patch), array)


@given(height=SIDES, width=SIDES, patch=SIDES, data=st.data())
def test_order_inside_tokens(height, width, patch, data):
    """Token (y, x) holds its square as (row, column, channel)."""
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    row, column, channel = data.draw(st.tuples(*[st.integers(0, n - 1) for n in (patch, patch, 3)]))
    array = np.arange(3 * height * patch * width * patch).reshape(3, height * patch, width * patch)
    token = images.tokens(array, patch)[y * width + x]
    assert token[(row * patch + column) * 3 + channel] == array[channel, y * patch + row, x * patch + column]


@given(more=st.tuples(*[st.integers(0, 20)] * 2), patch=SIDES, seed=st.integers(0, 99))
def test_patches_are_tokens_of_pixels(more, patch, seed):
    """To the bit, and without what is left over at the edges."""
    height, width = (patch + side for side in more)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    got, want = images.patches(image, patch), images.tokens(images.pixels(image), patch)
    assert got.dtype == np.float32
    assert np.array_equal(got, want)


def test_positions():
    assert images.positions(2, 3, 8).tolist() == [0, 1, 2, 8, 9, 10]
    assert images.positions(8, 8, 8).tolist() == list(range(64))


# ---- what is refused


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (4000, 20), (1, 1)])
def test_thin_images_that_are_taken(size):
    Request(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(201, 1), (1, 4000), (4001, 20), (0, 5), (5, 0), (0, 0)])
def test_too_thin_images(size):
    with pytest.raises(ValueError, match=rf"inputs\[1\]: an image of {size[0]}x{size[1]} pixels .* at most 200 times"):
        Request(["a text", Image.new("RGB", size)])


def test_grid_beyond_the_table():
    images.check_grid(8, 8, 8, 16, "here")
    with pytest.raises(ValueError, match=r"here: 16x144 pixels .* 1x9 tokens, .* 8x8 .* at most 128 pixels"):
        images.check_grid(1, 9, 8, 16, "here")
