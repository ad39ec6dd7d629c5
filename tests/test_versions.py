"""Libraries that are too old to be right are refused where a model is loaded, or warned of."""

import logging
import re
import tomllib

import onnxruntime
import PIL
import pytest
import torch
from bundles import SMALL
from support import CHECKPOINT, ROOT

import bagel_opt
from bagel_opt.export import export
from bagel_opt.versions import EXTRAS, LEAST, PILLOW, check_onnxruntime, check_version, older_pillow


@pytest.mark.parametrize(
    ("library", "version", "right"),
    [
        ("onnxruntime", "1.27.0", False),
        ("onnxruntime", "1.9.5", False),
        ("onnxruntime", "0.99", False),
        ("onnxruntime", "1.28.0", True),
        ("onnxruntime", "1.100.0", True),
        ("onnxruntime", "2.0", True),
        ("onnxruntime-gpu", "1.30.2", False),
        ("onnxruntime-gpu", "1.31.0", True),
        ("torch", "2.10.1+cu128", False),
        ("torch", "2.11.0+cpu", True),
        ("torch", "2.13.0a0+gitabcdef", True),
        ("torch", "3.0.0", True),
    ],
)
def test_versions(library, version, right):
    if right:
        return check_version(library, version)
    with pytest.raises(ImportError) as caught:
        check_version(library, version)
    message = str(caught.value)
    assert message.startswith(f"{library} {version} is too old: ")
    assert f"so {LEAST[library]} or newer is needed; pip install --upgrade 'bagel-opt[{EXTRAS[library]}]'" in message
    return None


def test_a_bundle_is_refused_to_an_old_onnxruntime(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.27.0")
    with pytest.raises(ImportError, match=r"^onnxruntime 1\.27\.0 is too old"):
        bagel_opt.load(bundle, check=False)


@pytest.mark.parametrize(
    ("providers", "says"),
    [
        (["CPUExecutionProvider"], "onnxruntime 1.30.0 is built without CUDA; pip uninstall onnxruntime; pip install"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], "onnxruntime-gpu 1.30.0 is too old: "),
    ],
)
def test_an_onnxruntime_that_is_not_for_gpus(monkeypatch, providers, says):
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    check_onnxruntime("cpu")
    with pytest.raises(ImportError, match=f"^{re.escape(says)}"):
        check_onnxruntime("cuda")


def test_checkpoints_and_archives_are_refused_to_an_old_torch(two, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    for call in (
        lambda: bagel_opt.load(CHECKPOINT),
        lambda: bagel_opt.load(two, check=False),
        lambda: export(CHECKPOINT, tmp_path / "out", SMALL),
    ):
        with pytest.raises(ImportError, match=r"^torch 2\.10\.0\+cpu is too old"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_the_extras_ask_for_no_older_ones():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for library, extra in EXTRAS.items():
        [asked] = [line for line in extras[extra] if re.match(rf"{library}(\[|>)", line)]
        check_version(library, asked.partition(">=")[2])
    assert f"pillow>={PILLOW}" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_an_older_pillow_is_warned_of(bundle, monkeypatch, caplog):
    for load in (lambda: bagel_opt.load(CHECKPOINT), lambda: bagel_opt.load(bundle, check=False)):
        for version, told in (
            ("12.3.0", True),
            ("9.5", True),
            ("13.0.0", False),
            ("13.0.0.dev0", False),
            ("20", False),
        ):
            monkeypatch.setattr(PIL, "__version__", version)
            caplog.clear()
            load()
            warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
            assert warned == (["; ".join(older_pillow())] if told else [])
            assert all(line.startswith(f"pillow {version} resizes") for line in warned)
