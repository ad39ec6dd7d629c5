"""A model's methods, and requests that it refuses."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import CHECKPOINT, ROOT

from bagel_opt import Model, Profile, ProfileError, Request

TINY = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)


def test_prompt_longer_than_the_profile(eager):
    fixed = Model(eager.runtime, eager.config, eager.tokenizer, [TINY])
    with pytest.raises(ProfileError, match=r"needs slots of at least [0-9]+, but profile 'tiny' has slots = 768"):
        fixed.chat("a cat " * 500, max_think_tokens=2)
    assert isinstance(fixed.chat("a cat " * 50, max_think_tokens=2), str)  # several chunks


def test_a_negative_prompt_like_the_prompt_guides_nowhere(eager):
    options = {"height": 32, "width": 32, "num_timesteps": 4, "seed": 0}
    plain = np.asarray(eager.generate("a cat", cfg_text_scale=1, **options), int)
    same = np.asarray(eager.generate("a cat", negative_prompt="a cat", **options), int)
    other = np.asarray(eager.generate("a cat", negative_prompt="a dog", **options), int)
    assert np.abs(same - plain).max() <= 1
    assert np.abs(other - plain).max() > 1


def test_image_of_4000_pixels_in_a_row(eager):
    with pytest.raises(ValueError, match=r"image: an image of 1x4000 pixels is too thin"):
        eager.edit(Image.new("RGB", (1, 4000)), "a")


SMALL = {"num_timesteps": 3, "seed": 0}
WIDE = Image.linear_gradient("L").resize((75, 40)).convert("RGB")  # read as 80x32


def test_edits_take_pictures_paths_and_bytes(eager, tmp_path):
    path = tmp_path / "a.png"
    WIDE.save(path)
    want = np.asarray(eager.edit(WIDE, "a", **SMALL))
    assert want.shape == (32, 80, 3)
    for given in (path, str(path), path.read_bytes()):
        assert np.array_equal(eager.edit(given, "a", **SMALL), want)
    few = {"max_think_tokens": 3}
    assert eager.understand(str(path), "a", **few) == eager.understand(WIDE, "a", **few)


def test_what_is_no_picture_and_what_is_no_text(eager):
    with pytest.raises(FileNotFoundError, match=r"image: there is no picture make it green"):
        eager.edit("make it green", "a.png")
    for call, message in (
        (lambda: eager.edit(np.zeros((8, 8, 3)), "a"), "image is ndarray; allowed are PIL"),
        (lambda: eager.understand(None, "a"), "image is NoneType; allowed are PIL"),
        (lambda: eager.edit(WIDE, WIDE), "instruction is Image; allowed is str"),
        (lambda: eager.understand(WIDE, None), "question is NoneType; allowed is str"),
        (lambda: eager.generate(WIDE), "prompt is Image; allowed is str"),
        (lambda: eager.chat(b"a"), "text is bytes; allowed is str"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_damaged_picture_that_was_opened_but_not_read(eager, tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((99, 99), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"^image: the picture cannot be read: .*truncated"):
        eager.understand(Image.open(path), "a")
    with pytest.raises(ValueError, match=r"^image: the picture cannot be read: its mode F holds .* 0 to 1 or 0 to"):
        eager.understand(Image.new("F", (8, 8), 300), "a")


def test_an_edit_in_its_inputs_size(eager):
    """It is the drawn picture, resized as the official code resizes inputs; with nothing to resize it is the same."""
    drawn = eager.edit(WIDE, "a", **SMALL)
    got = eager.edit(WIDE, "a", size="input", **SMALL)
    assert got.size == WIDE.size
    assert np.array_equal(got, drawn.resize(WIDE.size, Image.Resampling.BICUBIC))
    assert np.array_equal(eager.edit(drawn, "a", size="input", **SMALL), eager.edit(drawn, "a", **SMALL))


def test_an_edit_of_a_chosen_size(eager):
    """Its noise is what a picture of that size has; an input of that size is read otherwise."""
    got = eager.edit(WIDE, "a", height=32, width=64, **SMALL)
    assert got.size == (64, 32)
    fixed = Model(eager.runtime, eager.config, eager.tokenizer, [TINY])
    alike = np.asarray(fixed.edit(WIDE, "a", height=32, width=64, **SMALL), int)
    assert np.abs(alike - np.asarray(got)).max() <= 1
    larger = eager.edit(WIDE, "a", height=128, width=96, size="input", **SMALL)
    assert larger.size == WIDE.size
    with pytest.raises(ValueError, match="height=60; allowed: a multiple of 16"):
        eager.edit(WIDE, "a", height=60)


@pytest.mark.parametrize(("drawn", "rows"), [(0, 16), (1, 8)])
def test_how_many_share_rows(eager, monkeypatch, drawn, rows):
    """More where nothing is drawn: a token takes little longer for them."""
    found, fitted = [], Model._fitted
    monkeypatch.setattr(Model, "_fitted", lambda *given: found.append(fitted(*given)) or found[-1])
    draw = Request("a", height=32, width=32, num_timesteps=2)
    eager.run_many([Request("a", output="text", max_think_tokens=1)] * 17 + [draw] * drawn)
    assert [engine.profile.rows for engine in found] == [rows]


def test_errors_name_the_request(eager):
    assert eager.run_many([]) == []
    requests = [Request("a", height=32, width=32), Request("a", height=40)]
    with pytest.raises(ValueError, match="request 1: height=40; allowed: a multiple of 16"):
        eager.run_many(requests)


@pytest.mark.parametrize(("method", "output"), [("generate", "text"), ("chat", "image")])
def test_output_of_a_method_is_fixed(eager, method, output):
    with pytest.raises(ValueError, match=f"output='{output}'; this method's output is always .*; use run"):
        getattr(eager, method)("a", output=output)


def test_a_fork_of_the_process_is_told_to_load_its_own(tmp_path, bundle):
    """Of both runtimes, after they have computed with threads: it would wait for ever."""
    script = f"""
import os, sys
import bagel_opt
for source in ({str(CHECKPOINT)!r}, {str(bundle)!r}):
    model = bagel_opt.load(source)
    model.chat("hello", max_think_tokens=2)
    child = os.fork()
    if not child:
        try:
            model.chat("hello", max_think_tokens=2)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    model.chat("hello", max_think_tokens=2)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "this model was loaded in process" in line]
    assert len(lines) == 2
    assert "spawn" in lines[0]


def test_a_pickled_model_is_one_of_the_process_that_it_comes_to(eager, monkeypatch):
    data = pickle.dumps(eager)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="of which this one is a fork; load it in each process"):
        eager.chat("hello", max_think_tokens=2)
    assert pickle.loads(data).chat("hello", max_think_tokens=2)


IMAGE = Image.new("RGB", (32, 32))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m.edit(Image.new("RGB", (1, 300)), "a"), ValueError, "^image: an image of 1x300 pixels is too thin"),
        (lambda m: m.understand("nowhere.png", "a"), FileNotFoundError, "^image: there is no picture nowhere.png"),
        (
            lambda m: m.edit(Image.new("I", (8, 8), -1), "a"),
            ValueError,
            "^image: the picture cannot be read: its mode I",
        ),
        (lambda m: m.edit("", "a"), ValueError, "^image is ''; allowed are PIL"),
        (lambda m: m.run([IMAGE, Image.new("RGB", (1, 300))]), ValueError, r"^inputs\[1\]: an image of 1x300"),
        (lambda m: m.run({"a", "b"}), TypeError, "^inputs is set; allowed are str for texts"),
        (lambda m: m.run({"a": 1}), TypeError, "^inputs is dict; allowed are"),
        (lambda m: m.run_many(Request("a")), TypeError, "^requests is Request; allowed is a list of"),
        (lambda m: m.run_many(None), TypeError, "^requests is NoneType; allowed is a list of"),
        (
            lambda m: m.run_many([Request("a")] * 2, observers=[None]),
            ValueError,
            "^observers has 1; allowed: one, or None",
        ),
    ],
)
def test_bad_arguments_are_named(eager, call, kind, message):
    with pytest.raises(kind, match=message):
        call(eager)
