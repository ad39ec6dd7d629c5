"""The names and shapes of weights, told from sizes alone, against those of the network and of the exporter."""

import dataclasses
import time

import pytest
import torch
from support import CHECKPOINT, ODD

from bagel_opt.config import PUBLISHED
from bagel_opt.export.onnx import Shapes
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.parameters import in_onnx, parameter_shapes, quantized_shapes, stored_shapes
from bagel_opt.loading import shipped_model
from bagel_opt.model.bagel import Bagel

CONFIGS = {
    **{folder.parent.name: Checkpoint(folder).config for folder in (CHECKPOINT, ODD / "checkpoint", shipped_model())},
    "published": PUBLISHED,
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def test_a_models_parameters(config):
    with torch.device("meta"):
        model = Bagel(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    for kind in ("aoti", "export", "compile"):
        assert stored_shapes(config, kind, "cpu", {}) == parameter_shapes(config)


@pytest.mark.parametrize(
    "kinds",
    [
        {"und": "fp8", "gen": "int8"},
        {"vit": "int4", "embeddings": "int8"},
        {"gen": "int4", "head": "int8", "embeddings": "int4"},
        {},
    ],
    ids=str,
)
def test_a_quantised_models_parameters(config, kinds):
    with torch.device("meta"):
        model = Bagel(config)
    model.quantize(kinds)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert quantized_shapes(parameter_shapes(config), kinds) == found


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_an_onnx_bundles_weights(config, device, dtype):
    assert stored_shapes(config, "onnx", device, {}) == Shapes(config, getattr(torch, dtype), device).stored


def test_a_weight_in_onnx():
    """The last block of a row is stored whole."""
    assert in_onnx("int8", "cpu", 48, 168) == ((168, 48), (48,))
    assert in_onnx("int8", "cuda", 48, 168) == ((48, 2, 128), (96,))
    assert in_onnx("int4", "cpu", 48, 168) == in_onnx("int4", "cuda", 48, 168) == ((48, 6, 16), (288,))


def test_the_largest_model_that_is_allowed_is_told_at_once():
    most = dataclasses.replace(
        PUBLISHED,
        llm=dataclasses.replace(PUBLISHED.llm, num_hidden_layers=1024),
        vit=dataclasses.replace(PUBLISHED.vit, num_hidden_layers=1024),
        vae=dataclasses.replace(PUBLISHED.vae, ch_mult=(64,) * 8, num_res_blocks=64),
    )
    begun = time.monotonic()
    assert len(parameter_shapes(most)) > 39_000
    assert time.monotonic() - begun < 2
