"""What a model recommends: `generation` in config.json, which counts where a request gives nothing."""

import json
import shutil

import numpy as np
import pytest
from bundles import SMALL, cached_export, few_programs
from checkpoints import edit_json
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import CheckpointError, Profile, ProfileError, Request
from bagel_opt.cli.inspect import describe
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.sampling.planning import make_plan

RECA = {"cfg_renorm_min": 1.0}
ALL = {
    "cfg_renorm_min": 1.0,
    "cfg_interval": [0.0, 1.0],
    "num_timesteps": 3,
    "height": 64,
    "width": 64,
    "stop": ["Final Answer:", "<answer>"],
    "system_prompt": "Think with pictures.",
    "vit_min_size": 56,
}
FEW = {"num_timesteps": 3, "height": 64, "width": 64, "seed": 1}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")

    def recommends(table, place=tmp_path / "model"):
        edit_json(place, "config.json", generation=table)
        return place

    return recommends


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_it_counts_where_a_request_gives_nothing(folder, eager):
    model = bagel_opt.load(folder(RECA), device="cpu")
    plain, asked = (eager.generate("a cat", **FEW, **options) for options in ({}, RECA))
    assert not same(plain, asked)
    assert same(model.generate("a cat", **FEW), asked)
    assert same(model.generate("a cat", **FEW, cfg_renorm_min=0.0), plain)
    assert model.defaults.cfg_renorm_min == 1.0
    assert model.defaults.cfg_text_scale == 4.0


def test_sizes_that_are_recommended(folder):
    """height and width for pictures without an input image, size for those with one; what is asked for counts in both."""
    checkpoint = Checkpoint(folder({"height": 64, "width": 48, "size": "input"}))

    def drawn(*inputs, **given):
        plan = make_plan(Request(inputs, **given), checkpoint.config, checkpoint.tokenizer)
        return plan.canvas.grid, plan.resized

    image = Image.new("RGB", (100, 70))
    assert drawn("a") == ((4, 3), None)
    assert drawn("a", height=32) == ((2, 3), None)
    assert drawn(image, "a") == ((4, 6), (70, 100))
    assert drawn(image, "a", height=32, size=None) == ((2, 6), None)
    assert drawn(image, "a", output="interleaved") == ((4, 6), None)


@pytest.mark.parametrize(
    ("name", "options"), [("max_think_tokens", {"output": "text"}), ("max_rounds", {"output": "interleaved"})]
)
def test_lengths_that_are_recommended_are_fitted_to_a_profile(folder, name, options):
    checkpoint = Checkpoint(folder({"max_think_tokens": 4096, "max_rounds": 8, "height": 64, "width": 64}))
    profile = Profile("small", rows=3, slots=512, text=64, patches=64, latents=64)

    def plan(**given):
        return make_plan(Request("a", **options, **given), checkpoint.config, checkpoint.tokenizer)

    assert (plan().max_tokens, getattr(plan(), "rounds", 8)) == (4096, 8)
    fitted = plan().fitted(profile)
    assert fitted.max_tokens < 512
    assert getattr(fitted, "rounds", 1) < 8
    with pytest.raises(ProfileError, match="needs slots of at least"):
        plan(**{name: checkpoint.config.generation[name]}).fitted(profile)


def test_all_that_can_be_recommended_reaches_the_plan(folder):
    checkpoint = Checkpoint(folder(ALL))
    options = make_plan(Request("a"), checkpoint.config, checkpoint.tokenizer).options
    assert {name: getattr(options, name) for name in ALL} == {**ALL, "stop": tuple(ALL["stop"])}
    options = make_plan(Request("a", stop=None, height=32), checkpoint.config, checkpoint.tokenizer).options
    assert (options.stop, options.height, options.width) == (None, 32, 64)


def test_a_fine_tunes_folder_recommends_over_its_base(folder, tmp_path):
    base = folder({"cfg_renorm_min": 0.5, "cfg_text_scale": 3.0})
    tune = tmp_path / "tune"
    tune.mkdir()
    shutil.copy(CHECKPOINT / "ema.safetensors", tune / "model_bf16.safetensors")
    assert Checkpoint(base, tune).config.generation == {"cfg_renorm_min": 0.5, "cfg_text_scale": 3.0}
    (tune / "config.json").write_text(json.dumps({"generation": RECA}))
    assert Checkpoint(base, tune).config.generation == {"cfg_renorm_min": 1.0, "cfg_text_scale": 3.0}
    assert Checkpoint(base, tune / "model_bf16.safetensors").config.generation["cfg_renorm_min"] == 0.5
    (tune / "config.json").write_text(json.dumps({"generation": {"cfg_renorm_min": 2}}))
    with pytest.raises(CheckpointError, match=r"tune/config.json: generation: cfg_renorm_min=2; allowed: .* 0 to 1"):
        Checkpoint(base, tune)


def test_a_bundle_takes_it_along(folder):
    bundle = cached_export(folder(RECA), SMALL, name="recommends", format="export", programs=["choose"])
    with few_programs("choose"):
        model = bagel_opt.load(bundle)
    assert model.config.generation == RECA
    assert {name: getattr(model.defaults, name) for name in RECA} == RECA


def test_inspect_shows_it(folder):
    table = describe(folder(RECA))[-1]
    assert ("recommended cfg_renorm_min", "1.0") in list(zip(*(column.cells for column in table.columns), strict=True))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"cfg_renorm_min": 2}, "cfg_renorm_min=2; allowed: a number from 0 to 1"),
        ({"cfg_interval": [1, 0]}, "cfg_interval=[1, 0]; allowed: "),
        ({"stop": [""]}, "stop=['']; allowed: "),
        ({"system_prompt": 3}, "system_prompt=3; allowed: "),
        ({"system_prompt": "\ud800"}, "system_prompt holds characters that are no valid Unicode"),
        ({"seed": 1}, "'seed' is no option to recommend; there are: cfg_img_scale, "),
        ({"think": True}, "'think' is no option to recommend"),
        ({"on_step": None}, "'on_step' is no option to recommend"),
        ({"noise": [1]}, "'noise' is no option to recommend"),
        ({"temperature": 1}, "'temperature' is no option to recommend"),
        ([1], "holds list, not an object of options"),
        ({"stop": ["a" * 10**5]}, "stop=['aaa"),
        ("global", "holds str, not an object of options"),
    ],
)
def test_bad_ones_are_refused_in_one_line_that_names_the_file(folder, table, words):
    place = folder(table)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(place)
    assert str(caught.value).startswith(f"{place / 'config.json'}: generation: {words}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
