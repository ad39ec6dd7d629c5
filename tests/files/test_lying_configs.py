"""Numbers and JSON in a checkpoint's files that no model has: told at once, in one line, before anything is built."""

import dataclasses
import json
import math
import time

import pytest
from checkpoints import edit_json, read

from bagel_opt import CheckpointError
from bagel_opt.config import PUBLISHED
from bagel_opt.files.checkpoint import Checkpoint

FILES = ("config.json", "llm_config.json", "vit_config.json", "preprocessor_config.json", "tokenizer.json")
INDEX = "model.safetensors.index.json"


def refused(folder, *words):
    begun = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert time.monotonic() - begun < 5
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [10**5, 10**6, 10**18, 10**1000])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        *(
            ("llm_config.json", name)
            for name in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size")
        ),
        *(("vit_config.json", name) for name in ("num_hidden_layers", "hidden_size", "num_channels", "image_size")),
        ("config.json", "latent_patch_size"),
    ],
)
def test_an_absurd_size(folder, file, field, value):
    edit_json(folder, file, **{field: value})
    refused(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_res_blocks": 10**6},
        {"num_res_blocks": 50},
        {"ch": 32 * 10**17},
        {"z_channels": 10**18},
        {"ch_mult": [10**18]},
        {"ch_mult": [1] * 10**5},
        {"ch_mult": [1, 2.0]},
        {"ch_mult": "12"},
        {"scale_factor": 0},
        {"scale_factor": -0.3},
        {"shift_factor": 10**30},
        {"shift_factor": True},
    ],
)
def test_an_absurd_vae(folder, fields):
    edit_json(folder, "config.json", vae_config=fields)
    refused(folder)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_more_layers_than_there_are_weights_for(folder, file):
    edit_json(folder, file, num_hidden_layers=1000)
    refused(folder, "tensors missing", "layers.2.")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0, -1e-6, 1e300, 10**30, "1", True, [1]])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("llm_config.json", "rope_theta"),
        ("llm_config.json", "rms_norm_eps"),
        ("vit_config.json", "layer_norm_eps"),
    ],
)
def test_a_number_that_is_none(folder, file, field, value):
    edit_json(folder, file, **{field: value})
    finite = not isinstance(value, float) or math.isfinite(value)
    refused(folder, field if finite else f"{file} is not valid JSON: {json.dumps(value)} is no number")


@pytest.mark.parametrize("field", ["max_size", "min_size", "stride"])
@pytest.mark.parametrize("value", [0, -1, 10**18, 14.0])
def test_an_absurd_limit_of_pictures(folder, field, value):
    edit_json(folder, "preprocessor_config.json", vit={"max_size": 56, "min_size": 14, "stride": 14} | {field: value})
    refused(folder, field)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, '{"a": ' + "[" * 5000 + "]" * 5000 + "}"])
@pytest.mark.parametrize("file", [*FILES, INDEX])
def test_json_that_is_nested_deeply(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, file)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', "1" * 5000])
@pytest.mark.parametrize("file", [*FILES, INDEX])
def test_json_that_others_might_take_otherwise(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, file)


@pytest.mark.parametrize(
    "name", ["\x1b[31m.safetensors", "a\nb", "\x00", "\ud800", "." * 300, 3, None, ["a"], {"a": 1}]
)
def test_shards_with_names_that_no_file_has(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / "ema.safetensors").unlink()
    with pytest.raises((CheckpointError, FileNotFoundError, OSError)) as caught:
        read(folder)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("part", ["llm", "vit", "vae", "vae_resize", "vit_resize", "special"])
def test_the_published_sizes_are_far_from_the_limits(part):
    """Five times as much of each may be."""
    sizes = PUBLISHED.to_dict()[part]
    kind = type(getattr(PUBLISHED, part))
    for field in dataclasses.fields(kind):
        if allowed := field.metadata.get("range"):
            assert sizes[field.name] * 5 in allowed, field.name
