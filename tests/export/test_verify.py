"""`export --verify`: a bundle that differs from the eager model never gets into place."""

import platform
import re
import shutil
from importlib import metadata

import numpy as np
import pytest
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError, Profile
from bagel_opt.cli.commands import main
from bagel_opt.export import export, onnx
from bagel_opt.export.verify import _largest, relative, verify
from bagel_opt.files.manifest import read_manifest
from bagel_opt.programs.signatures import signatures

SMALL = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)


def test_a_right_bundle_passes_and_every_program_is_compared(bundle):
    errors = verify(bundle, CHECKPOINT)
    config = bagel_opt.load(bundle).config
    assert set(errors) == {*signatures(config, SMALL), "drawing", "editing", "answering"}
    assert max(errors.values()) < 1e-5
    # rounding differs between the two, so an error of nothing at all would mean that nothing was compared
    assert min(errors[name] for name in ("text", "generate", "vit", "drawing", "editing")) > 0


def test_a_wrong_bundle_is_named_and_does_not_get_into_place(tmp_path, bundle, monkeypatch, capsys):
    right, manifest = onnx.Shapes.as_stored, read_manifest(bundle)

    def wrong(shapes, name, weight):
        return right(shapes, name, weight * 1.01 if name == "llm.layers.1.und.o.weight" else weight)

    def copy_programs(model, profiles, folder, format, progress):
        for name in manifest.files:
            if name.endswith(".onnx"):
                shutil.copyfile(bundle / name, folder / name)
        return manifest.programs

    monkeypatch.setattr(onnx.Shapes, "as_stored", wrong)
    monkeypatch.setattr(bagel_opt.export.bundle, "_write_programs", copy_programs)
    with pytest.raises(BundleError, match=r"differs from the eager model by more than 0\.0001: text by"):
        export(CHECKPOINT, tmp_path / "bundle", manifest.profiles, verify=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(onnx.Shapes, "as_stored", right)
    folder = export(CHECKPOINT, tmp_path / "bundle", manifest.profiles, verify=True)
    assert bagel_opt.load(folder)
    tried = {"onnxruntime": metadata.version("onnxruntime"), "machine": platform.machine()}
    assert (read_manifest(folder).tried, manifest.tried) == (tried, {})
    for place, told in ((folder, f"onnxruntime {tried['onnxruntime']}, {tried['machine']}"), (bundle, "not recorded;")):
        assert main(["inspect", str(place), "--no-check"]) == 0
        shown = capsys.readouterr().out
        assert re.search(rf"tried with +│ +{re.escape(told)}", shown)
        assert re.search(rf"made with +│ +(bagel-opt .*, )?torch {re.escape(manifest.versions['torch'])}, onnx ", shown)


def test_nan_anywhere_is_the_largest_error():
    parts = [np.array([1.0]), np.array([np.nan]), np.array([1.0])]
    assert np.isnan(_largest(parts, [np.array([2.0])] * 3))


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        (np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.sqrt(2)),
        (np.array([10, 20], np.uint8), np.array([11, 20], np.uint8), 0),
        (np.array([10, 20], np.uint8), np.array([13, 20], np.uint8), 3 / 255),
        (np.array([np.nan]), np.array([1.0]), np.nan),
    ],
)
def test_relative_error(got, want, error):
    assert relative(got, want) == pytest.approx(error, nan_ok=True)
