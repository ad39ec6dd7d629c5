"""Recipes, profiles, and the memory that they say they need."""

import re
import tomllib

import pytest
import torch
from PIL import Image
from support import CHECKPOINT, ODD, ROOT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.cli.commands import main
from bagel_opt.config import PUBLISHED
from bagel_opt.export.recipe import load_recipe, recipes_folder
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.loading import shipped_model
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import load_profile
from bagel_opt.runtime.memory_plan import needs
from bagel_opt.sampling.default_profile import default_profile


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_whole(path):
    recipe = load_recipe(path.stem)
    assert path.read_text().startswith("# ")
    assert [load_profile(name).name for name in recipe.profiles] == recipe.profiles


def test_the_command_takes_recipes_and_overrides(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("bagel_opt.export.export", lambda *a, **k: calls.append((a, k)) or tmp_path)
    assert main(["export", "--recipe", "demo-aoti", "--dtype", "bfloat16", "--out", str(tmp_path)]) == 0
    ((_, _, profiles), options) = calls[0]
    assert profiles == ["demo"]
    assert {name: options[name] for name in ("format", "dtype", "device")} == {
        "format": "aoti",
        "dtype": "bfloat16",
        "device": "cpu",
    }
    assert main(["export", "--profile", "tiny", "--profile", "demo", "--out", str(tmp_path)]) == 0
    assert calls[1][0][2] == ["tiny", "demo"]
    assert main(["export", "--out", str(tmp_path)]) == 0
    (profile,) = calls[2][0][2]
    assert profile.name == "demo"
    assert "no profile was named: taking 'demo', for pictures and edits up to 128x128 (3 rows of 640 slots" in (
        capsys.readouterr().err
    )


def test_a_profile_is_chosen_by_the_models_sizes():
    """One of profiles/ where it fits, neither too small nor far too large; else one that holds an edit of the largest size."""
    assert default_profile(PUBLISHED).name == "bagel-edit-1024"
    assert default_profile(Checkpoint(shipped_model()).config).name == "demo"
    odd = Checkpoint(ODD / "checkpoint").config
    made = default_profile(odd)
    assert (made.name, made.rows, made.latents) == ("fitted", 3, (odd.default_size // odd.token_pixels) ** 2)
    model = bagel_opt.load(ODD / "checkpoint", device="cpu", profile=made)
    picture = Image.new("RGB", (odd.default_size, odd.default_size), "red")
    assert model.edit(picture, "make it green " * 3, num_timesteps=2).size == picture.size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 'onnx'", "missing field profiles"),
        ("format = 'onnx'\nprofiles = ['a']\nspeed = 3", "unknown field speed"),
        ("format = 'onnx'\nprofiles = 'a'", "profiles is 'a'; it must be a list"),
        ("format = 'onnx'\nprofiles = []", r"profiles is \[\]; it must be a list of names or files, at least one"),
        ("format = ['onnx']\nprofiles = ['a']", "format is .'onnx'.; it must be a text"),
        ("format = ", "is not valid TOML"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_recipe(path)
    with pytest.raises(FileNotFoundError, match="recipe 'nowhere' is neither a file nor one of: bagel-1024"):
        load_recipe("nowhere")


@pytest.mark.parametrize("name", ["bagel-1024", "bagel-edit-1024", "bagel-understand", "bagel-512"])
def test_profiles_of_the_published_model_say_what_they_need(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Bagel(PUBLISHED).parameters())
    needed = needs(PUBLISHED, load_profile(name), "bfloat16", 2 * parameters)
    text = "{weights:.1f} GB of weights, {caches:.1f} GB of caches, about {workspace:.1f} GB besides"
    path = ROOT / "profiles" / f"{name}.toml"
    assert text.format(**{part: count / 1e9 for part, count in needed.items()}) in path.read_text()
    assert tomllib.loads(path.read_text())["name"] == name


def test_inspect_tells_the_memory_before_anything_is_allocated(capsys, two, eager):
    assert main(["inspect", str(CHECKPOINT), "--profile", "tiny", "--dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    c = eager.config.llm
    assert "memory in bfloat16" in shown
    assert f"{3 * 1536 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 / 1e6:.3g} MB" in shown
    assert main(["inspect", str(two)]) == 0
    shown = capsys.readouterr().out
    assert "memory in float32" in shown
    assert "small" in shown


def test_caches_are_as_large_as_told(eager):
    profile = Profile("p", rows=2, slots=100, text=16, patches=16, latents=16)
    caches = eager.runtime.caches(profile.rows, profile.slots)
    told = needs(eager.config, profile, "float32", 0)["caches"]
    assert told == profile.batches * sum(cache.nbytes for cache in caches)
