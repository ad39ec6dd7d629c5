"""examples.json: read from a model's folder, taken along into a bundle, served to the page; never in anyone's way."""

import dataclasses
import io
import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from serving import serving
from starlette.testclient import TestClient
from support import CHECKPOINT

import bagel_opt
from bagel_opt.demo.checker import shows
from bagel_opt.demo.examples import SCENE, write_examples
from bagel_opt.demo.texts import describe
from bagel_opt.demo.world import Scene, Thing, draw
from bagel_opt.examples import Examples, copy_examples, read_examples
from bagel_opt.export import export
from bagel_opt.files.manifest import MANIFEST, check_files, read_manifest
from bagel_opt.loading import shipped_model
from bagel_opt.serve import Access, create_app

GOOD = {"prompts": ["a", "b", "c"], "picture": "example.png", "edit": "make it red", "question": "what is it?"}


@pytest.fixture
def folder(tmp_path):
    """A folder to put examples into; the picture is there."""
    inside = tmp_path / "model"
    inside.mkdir()
    Image.new("RGB", (32, 16), "red").save(inside / "example.png")
    Image.new("RGB", (32, 16), "blue").save(tmp_path / "outside.png")

    def write(data):
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        (inside / "examples.json").write_bytes(text)
        return inside

    return write


# ---- reading


def test_good_ones_are_read(folder, caplog):
    found = read_examples(folder(GOOD))
    assert (found.prompts, found.edit, found.question) == (("a", "b", "c"), "make it red", "what is it?")
    assert Image.open(io.BytesIO(found.picture)).size == (32, 16)
    assert caplog.records == []


def test_without_a_file_the_defaults_count(tmp_path, caplog):
    assert read_examples(tmp_path) == Examples()
    assert len(Examples().prompts) == 3
    assert Examples().picture is None
    assert caplog.records == []


def test_a_picture_is_no_must_and_may_be_a_link(folder, tmp_path):
    assert read_examples(folder({"prompts": ["a"]})) == Examples(("a",))
    inside = folder(GOOD)
    (inside / "example.png").unlink()
    (inside / "example.png").symlink_to(tmp_path / "outside.png")  # as the hub keeps its files
    assert read_examples(inside).picture


BAD = {
    "no JSON": b"{",
    "no UTF-8": b'{"prompts": ["\xff"]}',
    "deep": b"[" * 60000,
    "long": json.dumps({"prompts": ["a"], "more": "x" * 10**5}).encode(),
    "a list": ["a"],
    "no prompts": {"edit": "a"},
    "prompts in a text": GOOD | {"prompts": "abc"},
    "no prompt": GOOD | {"prompts": []},
    "four prompts": GOOD | {"prompts": ["a"] * 4},
    "a prompt that is none": GOOD | {"prompts": ["a", 3]},
    "an empty prompt": GOOD | {"prompts": [" "]},
    "a long prompt": GOOD | {"prompts": ["a" * 501]},
    "half a surrogate pair": b'{"prompts": ["\\ud800"]}',
    "an edit that is no text": GOOD | {"edit": None},
    "a question that is no text": GOOD | {"question": {"a": 1}},
    "a picture that is no name": GOOD | {"picture": 3},
    "an empty name": GOOD | {"picture": ""},
    "a NUL": GOOD | {"picture": "a\0.png"},
    "no such picture": GOOD | {"picture": "nowhere.png"},
    "a folder": GOOD | {"picture": "."},
    "no picture": GOOD | {"picture": "examples.json"},
    "one above": GOOD | {"picture": "../outside.png"},
    "one above, for Windows": GOOD | {"picture": "..\\outside.png"},
    "up and down": GOOD | {"picture": "a/../../outside.png"},
    "a drive": GOOD | {"picture": "C:\\outside.png"},
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_strange_ones_are_ignored_with_one_line(folder, tmp_path, caplog, data):
    inside = folder(data)
    assert read_examples(inside) == Examples()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{inside / 'examples.json'} is ignored: ")
    assert "\n" not in record.getMessage()
    copy_examples(inside, tmp_path)
    assert not (tmp_path / "examples.json").exists()


def test_an_absolute_name_is_ignored(folder, tmp_path, caplog):
    assert read_examples(folder(GOOD | {"picture": str(tmp_path / "outside.png")})) == Examples()
    assert "leads out of the folder" in caplog.text


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_a_damaged_picture_is_ignored(folder, caplog, keep):
    inside = folder(GOOD)
    data = (inside / "example.png").read_bytes()
    (inside / "example.png").write_bytes(data[:keep])
    assert read_examples(inside) == Examples()
    assert len(caplog.records) == 1


def test_a_huge_picture_is_ignored(folder, caplog):
    inside = folder(GOOD)
    Image.new("L", (4096, 1025)).save(inside / "example.png")
    assert read_examples(inside) == Examples()
    assert "has more than 4194304 pixels" in caplog.text


# ---- models and bundles


def test_a_loaded_model_has_them_and_they_cannot_be_set(eager):
    model = bagel_opt.load(device="cpu")
    assert model.examples == read_examples(shipped_model())
    assert eager.examples == Examples()  # the golden checkpoint has none
    with pytest.raises(AttributeError):
        model.examples = Examples()


def test_the_shipped_models_are_those_that_training_writes(tmp_path):
    write_examples(tmp_path)
    assert (tmp_path / "examples.json").read_bytes() == (shipped_model() / "examples.json").read_bytes()
    assert read_examples(tmp_path) == read_examples(shipped_model())
    assert np.array_equal(Image.open(tmp_path / "example.png"), draw(SCENE))


def test_the_shipped_model_does_them_right():
    model = bagel_opt.load(device="cpu")
    picture, told = Image.open(io.BytesIO(model.examples.picture)), model.examples
    circle, star, square = SCENE.things
    wanted = [
        Scene((Thing("circle", "red", "large", "center"),), "white"),
        Scene((Thing("star", "blue", "small", "top left"), Thing("ring", "green", "large", "bottom right")), "cream"),
        Scene(
            (
                Thing("star", "yellow", "large", "top"),
                Thing("square", "purple", "small", "left"),
                Thing("triangle", "orange", "large", "bottom right"),
            ),
            "black",
        ),
        Scene((circle, dataclasses.replace(star, colour="yellow"), square), "sky blue"),
    ]
    inputs = [*([prompt] for prompt in told.prompts), [picture, told.edit]]
    drawn = model.run_many([bagel_opt.Request(one, num_timesteps=9, seed=0) for one in inputs])
    assert [shows(outputs[-1], scene) for outputs, scene in zip(drawn, wanted, strict=True)] == [True] * 4
    assert model.understand(picture, told.question) == describe(SCENE)


def test_a_bundle_takes_them_along(bundle, load, tmp_path, folder):
    """And one without them, as older ones are, loads too."""
    assert load(CHECKPOINT, "onnx").examples == Examples()
    copy = shutil.copytree(bundle, tmp_path / "copy")
    copy_examples(folder(GOOD | {"picture": "example.png"}), copy)
    assert read_examples(copy).prompts == ("a", "b", "c")
    assert (copy / "example.png").is_file()


def test_export_writes_them_and_their_sha256(tmp_path, folder, monkeypatch):
    source = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    inside = folder(GOOD | {"picture": "pictures/first.png"})
    (source / "pictures").mkdir()
    shutil.copyfile(inside / "example.png", source / "pictures" / "first.png")
    shutil.copyfile(inside / "examples.json", source / "examples.json")
    monkeypatch.setattr("bagel_opt.export.bundle._write_programs", lambda *arguments: {})
    profile = bagel_opt.Profile("tiny", rows=1, slots=256, text=32, patches=64, latents=64)
    out = export(source, tmp_path / "bundle", profile, format="export")
    manifest = read_manifest(out)
    assert {"examples.json", "pictures/first.png"} <= set(manifest.files)
    check_files(out, manifest)
    assert read_examples(out).picture == read_examples(source).picture
    export(source, out, profile, format="export")  # an older bundle with examples can be replaced
    assert (out / MANIFEST).is_file()


# ---- the server


@pytest.fixture(scope="module")
def server(load):
    with serving(load(CHECKPOINT, "onnx"), keys=["secret"]) as running:
        yield running


def test_served_without_a_key_and_with_the_pages_headers(server, monkeypatch):
    web = TestClient(create_app(server.service, Access(("secret",))))
    assert web.get("/v1/models").status_code == 401
    page = web.get("/")
    answer = web.get("/examples.json")
    assert answer.json() == {
        "prompts": list(Examples().prompts),
        "edit": Examples().edit,
        "question": Examples().question,
        "picture": False,
    }
    assert web.get("/example.png").status_code == 404
    monkeypatch.setattr(server.engine.model, "_examples", Examples(("one",), b"PNG"))
    picture = web.get("/example.png")
    assert (picture.content, picture.headers["content-type"]) == (b"PNG", "image/png")
    assert web.get("/examples.json").json()["picture"] is True
    for name in ("content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"):
        assert page.headers[name] == answer.headers[name] == picture.headers[name]
    document = json.dumps(web.get("/openapi.json").json())
    assert "example.png" not in document
    assert "examples.json" not in document
