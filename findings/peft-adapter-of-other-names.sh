#!/bin/sh
# peft 0.21.2: an adapter whose tensors have other names than the model's modules loads with a warning, and does nothing:
# its new B factors stay zero. The same file with the right names changes the output. Who trained on a model's inner module
# and loads on the outer one gets the base model's answers.
# Seen on 2026-11-28, x86-64, Python 3.11, torch 2.13.0:
#   right names: output changed by the adapter; other names: output equal to the base model's, one warning
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 safetensors==0.8.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file


def base():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})})


trained = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
for name, parameter in trained.named_parameters():
    if "lora_B" in name:  # as after training; a new one is zero
        torch.nn.init.normal_(parameter)
trained.save_pretrained("adapter")
x, found = torch.ones(1, 8), {}
plain = base()["inner"]["q_proj"](x)
for names in ("right", "other"):
    if names == "other":
        tensors = load_file("adapter/adapter_model.safetensors")
        renamed = {name.replace("inner.", ""): tensor for name, tensor in tensors.items()}
        save_file(renamed, "adapter/adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(), "adapter")
    product = model.base_model.model["inner"]["q_proj"]
    found[names] = torch.allclose(product(x), plain), sum("missing" in str(warning.message) for warning in said)
print("peft", peft.__version__, "(output is the base model's, warnings):", found)
assert found["right"] == (False, 0), "right names have changed"
assert found["other"][0] and found["other"][1] >= 1, "other names are no longer passed over with a warning"
PYTHON
