"""Small checkpoints, read and damaged."""

import json

import torch
from safetensors.torch import load_file, save_file

from bagel_opt.files.checkpoint import Checkpoint

SMALL = {"heads": 4, "head_dim": 8, "mlp": 48, "vit_hidden": 16, "vit_side": 4, "latent_side": 4}
LAYER = "language_model.model.layers.1."
VIT = "vit_model.vision_model."


def read(folder, dtype=torch.float32):
    return Checkpoint(folder).load(torch.device("cpu"), dtype)


def weights(folder):
    return dict(read(folder).named_parameters())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def published(folder):
    tensors = load_file(folder / "ema.safetensors")
    return tensors | {f"vae.{name}": tensor for name, tensor in load_file(folder / "ae.safetensors").items()}


def edit_json(folder, file, **fields):
    path = folder / file
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def edit_weights(folder, **changes):
    tensors = load_file(folder / "ema.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "ema.safetensors")
