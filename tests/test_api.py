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
    with pytest.raises(ValueError, match=r"inputs\[0\]: an image of 1x4000 pixels is too thin"):
        eager.edit(Image.new("RGB", (1, 4000)), "a")


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
