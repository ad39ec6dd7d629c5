"""What a user may ask for."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from bagel_opt import Options, Request, UnknownOptionError

GOOD = {
    "output": ["image", "text", "interleaved"],
    "think": [True, False],
    "max_think_tokens": [None, 1, 1000, np.int64(7)],
    "do_sample": [True, False],
    "text_temperature": [0.3, 1, np.float32(2)],
    "top_p": [0, 0.9, np.float32(1)],
    "cfg_text_scale": [0, 1, 4.0, 100],
    "cfg_img_scale": [0, 1.5, 3],
    "cfg_interval": [(0.4, 1.0), [0, 1], (0.5, 0.5)],
    "cfg_renorm_min": [0, 0.5, 1.0],
    "cfg_renorm_type": ["global", "channel", "text_channel"],
    "timestep_shift": [0.5, 1, 3.0],
    "num_timesteps": [2, 50, np.int32(9)],
    "height": [None, 16, np.int32(64)],
    "width": [None, 16, 64],
    "size": [None, "input"],
    "stop": [None, (), ("a",), ("a", "b", "c", "d")],
    "system_prompt": [None, "", "you are"],
    "think_prompt": [None, "", "think"],
    **{f"{kind}_{side}_size": [None, 14, np.int64(512)] for kind in ("vit", "vae") for side in ("min", "max")},
    "seed": [None, 0, np.int64(3), 2**63 - 1],
    "negative_prompt": [None, "", "blurry"],
    "step_cache": [None, "taylorseer", "teacache"],
    "num_frames": [None, 1, np.int32(49)],
    "fps": [None, 1, 23.976, 240],
    **{f"resolution_{kind}": [None, 16, np.int64(768), 4096] for kind in ("vae", "vit")},
    "interleaved_context": ["rebuilt", "main"],
    "max_rounds": [None, 1, np.int32(3), 100],
    "draw_marker": [None, "", "<image_start>"],
    "adapters": [None, {}, {"a": 1, "b": np.float32(-0.5)}],
    "noise": [None],
    "vae_noise": [None],
    "on_step": [None, print],
    "on_token": [None, print],
    "on_output": [None, print],
}
NAN, INF = float("nan"), float("inf")
BAD = {
    "output": (["videos", "Image", None, 3], "'image', 'text', 'video' or 'interleaved'"),
    "think": ([1, None, "yes"], "True or False"),
    "max_think_tokens": ([0, -1, 2.5, "9", True], "at least 1"),
    "do_sample": ([0, None], "True or False"),
    "text_temperature": ([0, -0.1, NAN, INF, "0.3", None, True], "from 0.001 to 1000"),
    "top_p": ([-0.1, 1.1, NAN, "0.9", None, True], "from 0 to 1"),
    "cfg_text_scale": ([-1, NAN, INF, 1e39, "4", None, True], "from 0 to 1000"),
    "cfg_img_scale": ([-0.5, NAN, INF, None], "from 0 to 1000"),
    "cfg_interval": ([(0.5,), (0.6, 0.5), (-0.1, 1), (0, 1.1), (0, NAN), 0.4, "ab", None], "0 <= low <= high <= 1"),
    "cfg_renorm_min": ([-0.1, 1.1, NAN, None, "0"], "from 0 to 1"),
    "cfg_renorm_type": (["local", None, 1], "'global', 'channel', 'text_channel'"),
    "timestep_shift": ([0, 1e-46, -3, NAN, INF, None], "from 0.001 to 1000"),
    "num_timesteps": ([1, 0, -5, 50.0, "50", None, True], "at least 2"),
    "height": ([0, -16, 64.0, "64", True], "pixels"),
    "width": ([0, -16, 64.0, "64", True], "pixels"),
    "size": (["", "64x64", "Input", 64, (64, 64)], "None or 'input'"),
    "stop": ([3, "", [""], ["a"] * 5, "a" * 257, [1], b"a", {"a": 1}], "up to 4 texts of 1 to 256 characters"),
    "system_prompt": ([3, ["a"], b"a"], "a text"),
    "think_prompt": ([3, ["a"], b"a"], "a text"),
    **{
        f"{kind}_{side}_size": ([0, -14, 2**16 + 1, 512.0, "512", True], "pixels")
        for kind in ("vit", "vae")
        for side in ("min", "max")
    },
    "seed": ([-1, 2**63, 1.5, "1", True], "0 to 2**63 - 1"),
    "negative_prompt": ([3, ["blurry"], b"blurry"], "a text"),
    "step_cache": (["taylor", "none", False, 1], "None, 'taylorseer', 'teacache'"),
    "on_step": ([3, "print"], "function"),
    "on_token": ([3, "print"], "function"),
    "on_output": ([3, "print"], "function"),
    "num_frames": ([0, -1, 2.5, "9", True], "at least 1"),
    "fps": ([0, 241, NAN, "12", True], "from 1 to 240"),
    **{f"resolution_{kind}": ([0, 15, 4097, 64.0, "64", True], "from 16 to 4096") for kind in ("vae", "vit")},
    "interleaved_context": (["growing", None, 1], "'rebuilt', 'main'"),
    "max_rounds": ([0, -1, 101, 2.5, "3", True], "from 1 to 100"),
    "adapters": ([["a"], "a", {"a": "1"}, {"a": None}, {1: 1.0}, {"a": 101}, {"a": NAN}], "numbers from -100 to 100"),
    "draw_marker": ([3, ["<image_start>"], b"<"], "a text"),
}
OPTIONS = [field.name for field in dataclasses.fields(Options)]


@pytest.mark.parametrize("name", OPTIONS)
def test_good_values(name):
    for value in GOOD[name]:
        assert getattr(Request("a cat", **{name: value}).options, name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in BAD.items() for value in values])
def test_bad_values(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        Request("a cat", **{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}; allowed: ")
    assert BAD[name][1] in str(caught.value)


def test_every_option_is_tried():
    assert set(OPTIONS) == set(GOOD) == {*BAD, "noise", "vae_noise"}  # noise: below


@pytest.mark.parametrize("kind", [TypeError, ValueError, UnknownOptionError])
def test_unknown_option(kind):
    with pytest.raises(kind, match=r"unknown option 'steps', 'cfg'; there are: output, think, .*num_timesteps"):
        Request("a cat", steps=3, cfg=2, seed=1)


@pytest.mark.parametrize("inputs", [[], (), iter([])])
def test_empty_inputs(inputs):
    with pytest.raises(ValueError, match="inputs is empty; give at least one text or picture"):
        Request(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "inputs is NoneType"),
        (3, "inputs is int"),
        (["a cat", None], r"inputs\[1\] is NoneType"),
        (["a cat", np.zeros((8, 8, 3))], r"inputs\[1\] is ndarray"),
    ],
)
def test_wrong_inputs(inputs, message):
    with pytest.raises(TypeError, match=f"(?:{message}); allowed are str"):
        Request(inputs)


def test_one_input_or_several():
    image = Image.new("RGB", (8, 8))
    assert Request("a cat").inputs == ["a cat"]
    assert Request(image).inputs == [image]
    assert Request((image, "a cat")).inputs == [image, "a cat"]


def png(image, **settings):
    buffer = io.BytesIO()
    image.save(buffer, "png", **settings)
    return buffer.getvalue()


def test_pictures_by_path_and_as_bytes(tmp_path):
    """A str is a text, also one that names a file."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    path = tmp_path / "a.png"
    path.write_bytes(data := png(image))
    for given in (path, data, [path], [data], iter([path])):
        assert Request(given).inputs == [image]
    assert Request([path, "a cat", data]).inputs == [image, "a cat", image]
    assert Request(str(path)).inputs == [str(path)]


def test_files_are_turned_upright():
    exif = Image.Exif()
    exif[274] = 6
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 0, 0))
    [upright] = Request(png(image, exif=exif)).inputs
    assert (upright.size, upright.getpixel((3, 0))) == ((4, 8), (255, 0, 0))


BAD_FILES = {
    "a text": (b"a cat", "is no picture that Pillow can read; give PNG, JPEG or WebP"),
    "empty": (b"", "is no picture that Pillow can read; give PNG, JPEG or WebP"),
    "truncated": (png(Image.effect_noise((99, 99), 50))[:900], "cannot be read: .*truncated"),
    "huge": (png(Image.new("1", (20000, 20000)))[:200], "cannot be read: Image size .* exceeds limit"),
    "thin": (png(Image.new("L", (1, 300))), "1x300 pixels is too thin"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_pictures(tmp_path, name):
    data, message = BAD_FILES[name]
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    for given in (path, data):
        with pytest.raises(ValueError, match=rf"^inputs\[1\]: .*{message}") as caught:
            Request(["a cat", given])
        assert str(caught.value).isprintable()
        assert name == "thin" or ("odd.png" if given is path else "these bytes") in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^inputs\[0\]: there is no picture .*none\.png"):
        Request(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"^inputs\[0\]: the picture .* cannot be read: .*[Dd]irectory"):
        Request(tmp_path)
