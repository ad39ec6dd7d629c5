"""Bundles with weights in 8 and 4 bits."""

import json
import re
import shutil

import pytest
from bundles import ONE, PROFILES, cached_export, few_programs, rewrite
from support import CHECKPOINT

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.errors import BundleError
from bagel_opt.export import export
from bagel_opt.export.quantize import quantize
from bagel_opt.export.recipe import load_recipe
from bagel_opt.export.verify import verify
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights

TABLE = {"gen": "fp8", "und": "int4", "vit": "int8", "head": "int8", "embeddings": "int8"}
PROGRAMS = ("text", "decode", "decode_row", "choose", "choose_row")


@pytest.fixture(scope="module")
def bundle():
    """Its folder."""
    given = {"name": "quantized", "format": "export", "quantization": TABLE, "programs": PROGRAMS}
    return cached_export(CHECKPOINT, PROFILES[CHECKPOINT], **given)


def answers(model):
    return model.run(["what is it?"], output="text", max_think_tokens=12)


def test_it_gives_what_the_model_gives(bundle):
    with few_programs(*PROGRAMS):
        got = answers(bagel_opt.load(bundle))
    assert got == answers(bagel_opt.load(CHECKPOINT, device="cpu", quantization=TABLE))
    assert got != answers(bagel_opt.load(CHECKPOINT, device="cpu"))


@pytest.mark.second
@pytest.mark.parametrize("quantization", [TABLE, "int4"], ids=str)
def test_all_its_programs_do(tmp_path, quantization):
    folder = export(CHECKPOINT, tmp_path / "bundle", ONE, format="export", quantization=quantization)
    errors = verify(folder, CHECKPOINT)
    assert "drawing" in errors
    assert max(errors.values()) < (0.1 if quantization == TABLE else 1e-4)


def test_what_it_says_and_holds(bundle, tmp_path):
    """The same weights as a folder that was quantised before."""
    assert read_manifest(bundle).quantization == TABLE
    assert json.loads((bundle / "manifest.json").read_text())["quantization"] == TABLE
    folder = quantize(CHECKPOINT, tmp_path / "quantized", TABLE)
    with few_programs("step"):
        again = export(folder, tmp_path / "bundle", PROFILES[CHECKPOINT], format="export")
        assert read_manifest(again).quantization == TABLE
        assert (again / WEIGHTS).read_bytes() == (bundle / WEIGHTS).read_bytes()
        with pytest.raises(ValueError, match=r"is quantised, .* cannot change; leave that out"):
            export(folder, tmp_path / "other", PROFILES[CHECKPOINT], format="export", quantization="int8")
        with pytest.raises(ValueError, match=r"is quantised, .*; ONNX bundles take"):
            export(folder, tmp_path / "other", PROFILES[CHECKPOINT])
        for bad in ({"quantization": "fp8"}, {"quantization": "int8", "dtype": "float16"}):
            with pytest.raises(
                ValueError, match=r"quantization='.*'; ONNX bundles take 'int8' and 'int4', on the CPU in float32"
            ):
                export(CHECKPOINT, tmp_path / "other", PROFILES[CHECKPOINT], **bad)


def test_weights_of_other_kinds_than_it_says(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    rewrite(folder, quantization=TABLE | {"head": "fp8"})
    with (
        few_programs(*PROGRAMS),
        pytest.raises(BundleError, match=r"lm_head\.quantized\.codes is int8, not float8_e4m3fn"),
    ):
        bagel_opt.load(folder)
    rewrite(folder, quantization=TABLE | {"head": "nf4"})
    with pytest.raises(BundleError, match=r"quantization\.head must be one of \['fp8', 'int8', 'int4'\]"):
        bagel_opt.load(folder)


def test_inspect_tells_it(bundle, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with few_programs(*PROGRAMS):
        assert main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"{part} in +│ +{kind} ", shown) for part, kind in TABLE.items())
    held = sum(place.length for place in locate_weights(bundle / WEIGHTS).values())
    assert re.search(rf"│ +{held / 1e6:.3g} MB │", shown)


def test_recipes_and_the_command(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('format = "export"\nprofiles = ["tiny"]\nquantization = {gen = "fp8", und = "int4"}\n')
    assert load_recipe(recipe).quantization == {"gen": "fp8", "und": "int4"}
    given = []
    monkeypatch.setattr("bagel_opt.export.export", lambda *_, **settings: given.append(settings["quantization"]))
    for more in ([], ["--quantization", "und=int8"]):
        assert main(["export", "--recipe", str(recipe), "--out", "x", *more]) == 0
    assert given == [{"gen": "fp8", "und": "int4"}, {"und": "int8"}]
    recipe.write_text('format = "export"\nprofiles = ["tiny"]\nquantization = "nf4"\n')
    with pytest.raises(ValueError, match=r"recipe\.toml: quantization='nf4'; allowed: 'fp8' or"):
        load_recipe(recipe)
