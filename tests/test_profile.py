"""Bundles of several profiles: what they share, and which one a request takes."""

import re

import numpy as np
import pytest
from bundles import SMALL
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import ProfileError
from bagel_opt.export import export
from bagel_opt.files.manifest import read_manifest
from bagel_opt.profile import load_profile
from bagel_opt.sampling.planning import make_plan


def test_profiles_share_weights_and_what_programs_they_can(two):
    manifest = read_manifest(two)
    assert [profile.name for profile in manifest.profiles] == ["small", "large"]
    small, large = (manifest.programs[profile.name] for profile in manifest.profiles)
    assert small["vae_encode"] == large["vae_encode"]
    assert {name for name, entry in small.items() if entry["parts"] != large[name]["parts"]} == {"step"}
    assert len([name for name in manifest.files if "weights" in name]) == 1


def test_a_request_takes_the_smallest_profile_that_fits(two, eager, monkeypatch):
    model, seen = bagel_opt.load(two), []
    original = type(model.runtime).for_profile
    monkeypatch.setattr(type(model.runtime), "for_profile", lambda self, p: seen.append(p.name) or original(self, p))
    sides = (64, 128, 48)
    requests = [
        bagel_opt.Request(["a red circle"], height=side, width=side, num_timesteps=3, seed=1, cfg_text_scale=4.0)
        for side in sides
    ]
    pictures = [outputs[0] for outputs in model.run_many(requests)]
    assert seen == ["small", "large"]
    assert model.runtime.for_profile(model.profiles[0]).weights is model.runtime.weights
    for picture, side, want in zip(pictures, sides, eager.run_many(requests), strict=True):
        assert picture.size == (side, side)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(want[0])).max() <= 1
    with pytest.raises(ProfileError, match="profile 'large' has slots = 512"):
        model.chat("a b " * 400)


def test_branches_stay_together_where_a_profile_has_the_rows(two):
    model = bagel_opt.load(two)

    def chosen(inputs, **options):
        plan = make_plan(bagel_opt.Request(inputs, **options), model.config, model.tokenizer)
        profile, plan = model.choose(plan)
        return profile.name, plan

    picture = Image.new("RGB", (48, 48))
    assert chosen(["a red circle"], height=32, width=32)[0] == "small"
    assert chosen([picture, "a red circle"], cfg_img_scale=1.0)[0] == "small"
    assert chosen([picture, "a red circle"])[0] == "large"
    # what the small one has no room for is not cut down to it
    name, plan = chosen("a b " * 90, output="text")
    assert (name, plan.max_tokens > 100) == ("large", True)


@pytest.mark.parametrize("field", ["rows", "slots", "text", "patches", "latents"])
@pytest.mark.parametrize("value", ["0", "-1", "1.0", "true", "'8'", "nan", "inf", "1" + "0" * 18, "[8]"])
def test_a_size_that_no_profile_has(tmp_path, field, value):
    sizes = {**dict.fromkeys(("rows", "slots", "text", "patches", "latents"), "8"), field: value}
    path = tmp_path / "p.toml"
    path.write_text("name = 'p'\n" + "".join(f"{name} = {size}\n" for name, size in sizes.items()))
    with pytest.raises(
        ProfileError, match=f"{re.escape(str(path))}: profile 'p': {field} is .*; it must be a whole number"
    ):
        load_profile(path)


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 10**5, "a = " + "1" * 5000, "name = 3\nrows = 1\nslots = 1\ntext = 1\npatches = 1\nlatents = 1"],
)
def test_a_profile_that_is_hardly_toml(tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ProfileError, match=re.escape(str(tmp_path / "p.toml"))) as caught:
        load_profile(tmp_path / "p.toml")
    assert str(caught.value).isprintable()


def test_no_profile_or_the_same_twice_is_refused(tmp_path):
    for profiles in ([], [SMALL, SMALL]):
        with pytest.raises(ValueError, match="give at least one, and no name twice"):
            export(CHECKPOINT, tmp_path / "out", profiles)
