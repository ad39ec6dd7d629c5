"""What a bundle fixed when it was exported, and what a machine lacks for a model."""

import logging
import shutil

import pytest
from bundles import rewrite
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError, ProfileError


def test_settings_that_a_bundle_fixes_are_refused(bundle):
    for settings in ({"dtype": "float16"}, {"profile": "tiny"}, {"attention": "flex"}, {"quantization": "fp8"}):
        with pytest.raises(BundleError, match="fixed when it was exported"):
            bagel_opt.load(bundle, **settings)
    with pytest.raises(
        BundleError, match="memory='12GB': a bundle keeps all its weights on the device; load the checkpoint"
    ):
        bagel_opt.load(bundle, memory="12GB")
    with pytest.raises(ValueError, match="backend='compile'"):
        bagel_opt.load(bundle, backend="compile")
    with pytest.raises(ValueError, match="device='cuda'"):
        bagel_opt.load(bundle, device="cuda")


def test_a_request_beyond_the_profile_is_refused(bundle):
    model = bagel_opt.load(bundle)
    with pytest.raises(ProfileError, match=r"needs slots of at least \d+, but profile 'tiny' has slots = 768"):
        model.chat("a b " * 400)


def test_a_bundle_with_flash_attention_is_refused_where_none_runs(small_bundle, tmp_path):
    """As it is loaded, and not in its first run."""
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    rewrite(folder, attention="flash")
    with pytest.raises(ValueError, match="attention='flash' runs on CUDA in bfloat16 or float16, not on cpu"):
        bagel_opt.load(folder, check=False)


def test_a_note_says_what_would_make_it_faster(monkeypatch, caplog):
    calls = []

    def faster(device, attention, asked):
        calls.append((device.type, attention, asked))
        return ["do this"]

    monkeypatch.setattr("bagel_opt.runtime.facts.faster", faster)
    with caplog.at_level(logging.INFO, "bagel_opt"):
        bagel_opt.load(CHECKPOINT, device="cpu")
    assert [record.getMessage() for record in caplog.records][-1:] == ["do this"]
    assert calls == [("cpu", "sdpa", True)]
