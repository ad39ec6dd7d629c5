"""How much of a profile is computed, where programs take any size."""

import bundles
import numpy as np
import pytest
import torch
from bundles import PROFILES
from PIL import Image
from support import CHECKPOINT, ODD

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.programs.interface import in_use
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_bundle import PackagedRuntime
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


def test_packages_get_their_inputs_in_plain_memory_order(monkeypatch):
    """Of a row's tokens the first ones are none of their own: aoti packages would read on where the row's rest lies
    (findings/torch-aoti-reads-slices-as-whole.sh)."""
    seen, cut, opened = [], [], PackagedRuntime._open

    def recording(runtime, file):
        part = opened(runtime, file)
        return lambda inputs, weights: seen.append((file, inputs)) or part(inputs, weights)

    monkeypatch.setattr(PackagedRuntime, "_open", recording)
    bundle = bagel_opt.load(bundles.cached_export(CHECKPOINT, PROFILES[CHECKPOINT], format="export"), check=False)
    runtime = bundle.runtime
    programs = runtime.manifest.programs
    programs[LARGE.name] = programs[bundle.profiles[0].name]  # one set serves all profiles
    model = bagel_opt.Model(runtime, bundle.config, bundle.tokenizer, [LARGE])
    run = PackagedRuntime.run
    monkeypatch.setattr(
        PackagedRuntime,
        "run",
        lambda self, program, inputs, *given: (cut.extend(inputs), run(self, program, inputs, *given))[1],
    )
    model.run_many([Request(["a red circle"], height=32, width=s, num_timesteps=3, seed=1) for s in (32, 48)])
    assert any(isinstance(x, torch.Tensor) and not x.is_contiguous() for x in cut)  # the loop does hand on such slices
    assert not [file for file, inputs in seen if not all(x.is_contiguous() for x in inputs)]
