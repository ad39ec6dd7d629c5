"""A model's methods, and requests that it refuses."""

import numpy as np
import pytest
from PIL import Image

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
