"""How much of a profile is computed, where programs take any size."""

import numpy as np
import pytest
from PIL import Image
from support import ODD

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.programs.interface import in_use
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare

SIZES = {"text": {64}, "vit": {64}, "generate": {64, 128}}  # by the beginning of a program's name
LARGE = Profile("large", rows=4, slots=1200, text=160, patches=192, latents=256)


class Recorded(TorchRuntime):
    """Keeps the program and the shape of the first input of each call."""

    def run(self, program, inputs, caches=(), rows=None):
        self.seen.append((program, tuple(inputs[0].shape)))
        return super().run(program, inputs, caches, rows)


def recorded(eager, free=True):
    runtime = Recorded(prepare(eager.runtime.model))
    runtime.seen, runtime.free_sizes = [], free
    return bagel_opt.Model(runtime, eager.config, eager.tokenizer, [LARGE])


@pytest.mark.parametrize(
    ("need", "size", "used"), [(0, 256, 64), (1, 256, 64), (64, 256, 64), (65, 256, 128), (65, 100, 100)]
)
def test_in_steps_of_64_up_to_the_size(need, size, used):
    assert in_use(need, size) == used


@pytest.mark.parametrize("free", [True, False])
def test_programs_get_what_the_longest_request_needs(load, free):
    """Beside a request of 6 latents one of 80 draws."""
    model = recorded(load(ODD / "checkpoint", "eager"), free)
    side, picture = model.config.token_pixels, Image.new("RGB", (48, 32))
    model.run_many(
        [
            Request([picture, "a red circle"], height=2 * side, width=3 * side, num_timesteps=3, seed=1),
            Request(["a blue one"], height=8 * side, width=10 * side, num_timesteps=3, seed=1, cfg_text_scale=1.0),
        ]
    )
    found = {name: {s[1] for program, s in model.runtime.seen if program.startswith(name)} for name in SIZES}
    assert found == (SIZES if free else {"text": {160}, "vit": {192}, "generate": {256}})


@pytest.mark.parametrize("step_cache", [None, "taylorseer", "teacache"])
def test_what_is_left_out_changes_nothing(eager, step_cache):
    asked = [
        Request(["a red circle"], height=height, width=width, num_timesteps=9, seed=2, step_cache=step_cache)
        for height, width in ((48, 32), (64, 112))
    ]
    whole, cut = (recorded(eager, free).run_many(asked) for free in (False, True))
    for (a,), (b,) in zip(whole, cut, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
