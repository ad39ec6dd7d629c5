"""The tests' own cache of exports: it may never hand out a bundle of other code, weights or settings."""

import os
import shutil
from pathlib import Path

import bundles
import onnx
import pytest
import torch
from bundles import ONE, SMALL, cached_export, few_programs, key, traced_here
from support import CHECKPOINT

import bagel_opt
from bagel_opt.export import export
from bagel_opt.files.manifest import MANIFEST, read_manifest


@pytest.fixture
def exports(monkeypatch, tmp_path):
    """An empty cache, and what is exported into it."""
    made = []

    def export(checkpoint, out, profiles, **settings):
        made.append((profiles, settings))
        out.mkdir()
        (out / MANIFEST).touch()

    monkeypatch.setattr(bundles, "CACHE", tmp_path / "exports")
    monkeypatch.setattr(bundles, "export", export)
    return made


def test_the_key_tells_all_that_an_export_is_made_from(tmp_path):
    copy = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    keys = [key(copy, [ONE]), key(copy, [SMALL]), key(copy, [SMALL, ONE]), key(copy, [ONE], format="export")]
    data = bytearray((copy / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "ema.safetensors").write_bytes(data)
    keys.append(key(copy, [ONE]))
    assert len(set(keys)) == len(keys)
    assert key(CHECKPOINT, [ONE]) == keys[0]  # wherever it lies


@pytest.mark.parametrize("name", ["model/transformer.py", "export/onnx.py", "files/manifest.schema.json", "config.py"])
def test_a_changed_source_is_another_key(name, monkeypatch, tmp_path):
    before, found = key(CHECKPOINT, [ONE]), bundles.sources()
    changed = tmp_path / "changed"
    changed.write_bytes(found[name].read_bytes() + b"\n")
    monkeypatch.setattr(bundles, "sources", lambda: {**found, name: changed})
    assert key(CHECKPOINT, [ONE]) != before


def test_all_sources_count_but_those_above_exporting():
    package = Path(bagel_opt.__file__).parent
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        assert (name in bundles.sources()) == (name.split("/")[0] not in ("bench", "cli", "demo", "serve")), name


def test_an_export_is_made_once_and_the_oldest_go(exports, monkeypatch):
    monkeypatch.setattr(bundles, "KEPT", 2)
    folders = []
    for number, dtype in enumerate(("float32", "float16", "float32", "bfloat16")):
        folders.append(cached_export(CHECKPOINT, ONE, dtype=dtype))
        os.utime(folders[-1].parent, (number, number))
    assert [settings["dtype"] for _, settings in exports] == ["float32", "float16", "bfloat16"]
    assert folders[0] == folders[2]
    assert [(folder / MANIFEST).exists() for folder in folders] == [True, False, True, True]


def test_archives_that_are_kept_are_those_of_an_export_by_itself(tmp_path):
    """Traced for another profile, before."""
    few = ("choose", "step")
    cached_export(CHECKPOINT, [ONE, SMALL], format="export", programs=few)
    kept = cached_export(CHECKPOINT, SMALL, name="kept", format="export", programs=few)
    with few_programs(*few):
        fresh = export(CHECKPOINT, tmp_path / "fresh", SMALL, format="export")
    assert read_manifest(kept).programs == read_manifest(fresh).programs
    archives = {path.name for path in fresh.glob("*.pt2")}
    assert archives == {path.name for path in kept.glob("*.pt2")} == {"choose-2.whole.pt2", "step-2.whole.pt2"}
    for name in archives:
        codes = [torch.export.load(folder / name).graph_module.code for folder in (fresh, kept)]
        assert codes[0] == codes[1]


def content(path):
    """Of an ONNX graph, with numbers in place of the names of what no other file knows."""
    graph, names = onnx.load(path, load_external_data=False).graph, {}
    values = {tensor.name: tensor for tensor in graph.initializer}
    known = {value.name for value in (*graph.input, *graph.output)}
    known |= {name for name, tensor in values.items() if tensor.data_location == onnx.TensorProto.EXTERNAL}

    def told(name):
        if name in known:
            return name
        if name in values:
            return onnx.numpy_helper.to_array(values[name]).tolist()
        return names.setdefault(name, len(names))

    nodes = [
        (
            node.op_type,
            *([told(name) for name in side] for side in (node.input, node.output)),
            [*map(str, node.attribute)],
        )
        for node in graph.node
    ]
    return nodes, [*map(str, graph.input)], [*map(str, graph.output)]


@pytest.mark.second
def test_what_is_traced_once_is_as_if_it_were_traced_by_itself(monkeypatch, tmp_path):
    """For a GPU, where it was traced for the CPU before."""
    monkeypatch.setattr(bundles, "CACHE", tmp_path / "exports")
    few, traced = ("vae_decode", "step"), []
    for folder, device, alike in (("cpu", "cpu", few), ("kept", "cuda", few), ("fresh", "cuda", ())):
        monkeypatch.setattr(bundles, "ALIKE", alike)
        with few_programs(*few), traced_here():
            export(CHECKPOINT, tmp_path / folder, SMALL, device=device)
        traced.append(len([*bundles.CACHE.rglob("traced.onnx")]))
    assert traced == [2, 2, 2]
    for name in few:
        assert content(tmp_path / "kept" / f"{name}.onnx") == content(tmp_path / "fresh" / f"{name}.onnx")


def test_what_has_layers_is_traced_for_each_bundle(monkeypatch, tmp_path):
    monkeypatch.setattr(bundles, "CACHE", tmp_path / "exports")
    monkeypatch.setattr(bundles, "ALIKE", ("vit",))
    with few_programs("vit"), traced_here(), pytest.raises(AttributeError, match="NoneType"):
        export(CHECKPOINT, tmp_path / "bundle", SMALL)


def test_a_bundle_that_is_not_whole_is_made_again(exports):
    folder = cached_export(CHECKPOINT, ONE)
    shutil.rmtree(folder)
    assert cached_export(CHECKPOINT, ONE) == folder
    assert len(exports) == 2
