"""What loading a bundle refuses."""

import json
import re
import shutil

import pytest
from bundles import rewrite

import bagel_opt
from bagel_opt import BundleError, CheckpointError
from bagel_opt.files.manifest import FORMAT, MANIFEST, READ, WEIGHTS, _digest, _dump, read_manifest


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_manifest_tells_what_is_there(bundle):
    manifest = read_manifest(bundle)
    assert manifest.kind == "onnx"
    assert manifest.dtype == "float32"
    assert [profile.name for profile in manifest.profiles] == ["tiny"]
    assert set(manifest.files) == {path.name for path in bundle.iterdir()} - {MANIFEST}
    assert manifest.programs["tiny"]["generate"]["inputs"]["x"] == [[3, 64, 64], "float32"]
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in manifest.files.values())


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "tokenizer.json", "generate.onnx", "vae_decode.onnx"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_one_changed_byte_is_refused(copy, name, place):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=re.escape(str(path))):
        bagel_opt.load(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "text.onnx", "tokenizer.json"])
def test_a_missing_or_truncated_file_is_refused(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=re.escape(str(path))):
        bagel_opt.load(copy)
    path.unlink()
    with pytest.raises(BundleError, match=f"{re.escape(str(path))} is missing"):
        bagel_opt.load(copy)


def test_a_bundle_without_its_manifest_is_no_checkpoint(copy):
    (copy / MANIFEST).unlink()
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(copy))} has a bundle's weights, but no {MANIFEST}; copy or"
    ):
        bagel_opt.load(copy)


def test_formats_that_are_refused(copy):
    first, last = READ[0], FORMAT
    for version, advice in ((last + 1, "upgrade it"), (first - 1, "export the bundle again"), ("x", "export")):
        rewrite(copy, format=version)
        with pytest.raises(
            BundleError, match=f"bundle format {version}; this bagel_opt reads {first} to {last}, so {advice}"
        ):
            bagel_opt.load(copy)


def test_format_6_is_read(copy):
    """It is as 7 but for what a bundle was tried with."""
    assert read_manifest(copy).tried == {}  # exported without --verify
    data = json.loads((copy / MANIFEST).read_text())
    del data["tried"], data["sha256"]
    data["format"] = 6
    (copy / MANIFEST).write_text(_dump({**data, "sha256": _digest(data)}))
    assert bagel_opt.load(copy).chat("hello", max_think_tokens=2)
    assert read_manifest(copy).tried == {}


@pytest.mark.parametrize("kind", ["aoti", "export"])
def test_older_bundles_in_8_and_4_bits_of_torchs_formats_are_refused(copy, kind):
    rewrite(copy, format=8)
    assert read_manifest(copy)
    rewrite(copy, format=8, quantization={"und": "int8"})
    assert read_manifest(copy)  # ONNX has operators of its own
    rewrite(copy, format=8, kind=kind, quantization={"und": "int8"})
    with pytest.raises(BundleError, match=r"a bundle of format 8 in 8 or 4 bits.*export the bundle again"):
        bagel_opt.load(copy)


def test_files_outside_the_bundle_are_refused(copy):
    files = json.loads((copy / MANIFEST).read_text())["files"]
    rewrite(copy, files={**files, "../secret": {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="outside"):
        bagel_opt.load(copy)
    (copy / "secret").symlink_to("/etc/hostname")
    rewrite(copy, files={**files, "secret": {"size": 1, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match="outside"):
        bagel_opt.load(copy)
    rewrite(copy, files={name: entry for name, entry in files.items() if name != "text.onnx"})
    with pytest.raises(BundleError, match=r"no sha256 of text\.onnx"):
        bagel_opt.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pickle"}, "data.kind must be one of"),
        ({"profiles": []}, "data.profiles must contain at least 1 items"),
        ({"profiles": [{"name": "x", "rows": 0}]}, "data.profiles"),
        ({"extra": 1}, "data must not contain"),
        ({"programs": {"tiny": {"text": {"inputs": {}}}}}, "data.programs.tiny.text must contain"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(copy, change, message):
    rewrite(copy, **change)
    with pytest.raises(BundleError, match=message):
        bagel_opt.load(copy)


def test_digests_can_be_skipped_but_sizes_cannot(copy):
    path = copy / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bagel_opt.load(copy, check=False)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="changed or truncated"):
        bagel_opt.load(copy, check=False)
