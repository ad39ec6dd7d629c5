"""What a bundle fixed when it was exported, and what a machine lacks for a model."""

import logging
import re
import shutil

import pytest
import torch
from bundles import rewrite
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError, ProfileError
from bagel_opt.devices import check_kinds


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
    said = r"attention='flash' runs on CUDA in bfloat16 or float16, not on cpu in .*; export it with attention='sdpa'$"
    with pytest.raises(BundleError, match=f"^{re.escape(str(folder))}: {said}"):
        bagel_opt.load(folder, check=False)


@pytest.mark.parametrize("gpus", [None, 2])
def test_a_bundle_for_cuda_is_refused_where_there_is_none(small_bundle, tmp_path, monkeypatch, gpus):
    """Nobody gave a device, and device='cpu' would not do either."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    rewrite(folder, device="cuda")
    for device in (None, "cuda"):
        with pytest.raises(BundleError) as refused:
            bagel_opt.load(folder, check=False, gpus=gpus, device=device)
        said = "is for CUDA, of which this torch finds no device; export it with device='cpu'"
        assert str(refused.value) == f"{folder} {said}"


def test_what_is_quantised_already_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    with pytest.raises(
        ValueError, match=r"^some/folder is quantised: 'fp8' needs a GPU of compute capability 8\.9, and "
    ) as it:
        check_kinds(torch.device("cuda"), {"gen": "fp8"}, "some/folder")
    assert str(it.value).endswith("Some GPU has 8.0; quantise it anew with 'int8' or 'int4'")


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


PLACE = "give a checkpoint folder, a bundle or a repo id such as"


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"source": ""}, FileNotFoundError, f"^'' names nothing; {PLACE}"),
        ({"source": 3}, TypeError, f"^3 is int; {PLACE}"),
        ({"source": "a" * 5000}, FileNotFoundError, "^a{200} is no folder and no file; give"),
        ({"weights": ""}, FileNotFoundError, "^'' names nothing; give a fine-tune's file, folder or repo id"),
        ({"weights": b"a"}, TypeError, "^b'a' is bytes; give a fine-tune's"),
        ({"lora": ""}, FileNotFoundError, "^'' names nothing; give the folder that peft wrote"),
        ({"adapters": {"a": ""}}, FileNotFoundError, "^'' names nothing; give the folder that peft wrote"),
        ({"device": ["cpu"]}, ValueError, r"^device=.*cpu.*; allowed are 'cpu', 'cuda' and 'cuda:N'$"),
        ({"profile": 3}, ProfileError, "^profile 3 is int; allowed: a file, or one of: bagel-1024"),
        ({"profile": {"rows": 1}}, ProfileError, "^profile {'rows': 1} is dict; allowed: a file, or one of"),
        ({"profile": ""}, FileNotFoundError, "^profile '' is neither a file nor one of: bagel-1024"),
    ],
)
def test_values_of_no_right_kind(given, kind, message):
    with pytest.raises(kind, match=message):
        bagel_opt.load(**{"source": CHECKPOINT, "device": "cpu", **given})
