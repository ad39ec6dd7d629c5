"""Adapters that peft itself makes, of a module tree named like the official one, with the golden weights."""

import pytest
import torch
from safetensors.torch import load_file
from support import CHECKPOINT
from torch import nn

peft = pytest.importorskip("peft")
GENERATION = ["q_proj_moe_gen", "k_proj_moe_gen", "v_proj_moe_gen", "o_proj_moe_gen"]
GENERATION += ["mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj", "mlp_moe_gen.down_proj"]
BOTH = r"language_model\..*(q_proj|v_proj|o_proj|down_proj)(_moe_gen)?|.*mlp_moe_gen\..*"  # of both experts
PEFT, FILE = "base_model.model.", "adapter_model.safetensors"


def tree(dtype=torch.float32):
    """Modules named as the official code's, with the golden weights."""
    root = nn.Module()
    for name, tensor in load_file(CHECKPOINT / "ema.safetensors").items():
        *path, kind = name.split(".")
        if kind != "weight" or tensor.ndim != 2 or "embed" in name:
            continue
        at = root
        for part in path[:-1]:
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        product = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        product.weight.data.copy_(tensor)
        at.add_module(path[-1], product)
    return root.to(dtype)


def adapted(dtype=torch.float32, seed=0, targets=GENERATION, **settings):
    """peft's model of that tree, whose adapter does something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **settings})
    config.init_lora_weights = False
    torch.manual_seed(seed)
    return peft.get_peft_model(tree(dtype), config)
