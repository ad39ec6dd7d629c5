"""The golden checkpoint in the layouts of other programs, each as that program's own code writes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dfloat11_encoder import compress
from safetensors.torch import load_file, save_file
from support import CHECKPOINT

from bagel_opt.errors import CheckpointError
from bagel_opt.files.checkpoint import Checkpoint

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER = [f"self_attn.{name}{gen}" for gen in ("", "_moe_gen") for name in NAMES]
LAYER += [f"mlp{gen}.{name}_proj" for gen in ("", "_moe_gen") for name in ("gate", "up", "down")]
PATTERNS = {r"language_model\.model\.layers\.\d+": LAYER, r"language_model\.lm_head": []}
PATTERNS |= {r"language_model\.model\.embed_tokens": []}


def tensors() -> dict[str, torch.Tensor]:
    return load_file(CHECKPOINT / "ema.safetensors")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def comfyui_notes() -> dict:
    """neverbiasu/ComfyUI-BAGEL, scripts/convert_bagel_model.py."""
    every = tensors()
    return {
        "format": "comfyui_bagel",
        "format_version": 1,
        "architecture": "Bagel",
        "variant": "BAGEL-7B-MoT",
        "source_repository": "",
        "source_revision": "",
        "source_hashes": {"ema.safetensors": "0" * 64},
        "dtype": "fp32",
        "quantization": "none",
        "tokenizer_fingerprint": "0" * 64,
        "special_token_ids": {"<|im_start|>": 269, "<|im_end|>": 270},
        "latent_format": "flux",
        "capabilities": ["text_to_image", "image_edit", "image_understanding"],
        "tensor_summary": {"num_tensors": len(every)},
        "model_configs": {name: read(CHECKPOINT, name) for name in ("llm_config.json", "vit_config.json")},
        "model_options": {},
        "additional_special_tokens": [],
        "converter_version": "1.0.0",
    }


def comfyui(path: Path, notes: dict | str | None = None) -> Path:
    """One file; notes: of its header in place of the right ones."""
    text = notes if isinstance(notes, str) else json.dumps(notes or comfyui_notes(), sort_keys=True)
    save_file(tensors(), path, metadata={"comfyui_bagel": text})
    return path


def dfloat11(folder: Path) -> Path:
    """LeanModels/DFloat11: a file for each group, one for all else, in bfloat16."""
    rest = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    groups = {f"language_model.model.layers.{i}": LAYER for i in range(3)}
    for group, paths in (groups | {"language_model.lm_head": [], "language_model.model.embed_tokens": []}).items():
        names = [f"{group}.{path}.weight" for path in paths] or [f"{group}.weight"]
        pieces = compress([rest.pop(name) for name in names])
        file = folder / f"{group.replace('.', '_')}.safetensors"
        save_file({f"{group}.{name}": piece for name, piece in pieces.items()}, file)
    save_file(rest, folder / "model.safetensors")
    for name in ("ema.safetensors", "model.safetensors.index.json"):
        (folder / name).unlink()
    settings = {"version": "0.5.0", "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": PATTERNS}
    config = read(folder, "config.json") | {"dfloat11_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def veomni(folder: Path) -> Path:
    """ByteDance-Seed/VeOmni, branch omniv2, veomni/models/seed_omni/modules/bagel/convert_model.py; its config.json is what
    transformers 5 writes."""
    every, llm, vit = tensors(), read(CHECKPOINT, "llm_config.json"), read(CHECKPOINT, "vit_config.json")
    top, sizes = read(CHECKPOINT, "config.json"), read(CHECKPOINT, "preprocessor_config.json")
    rope = {"rope_parameters": {"rope_theta": llm.pop("rope_theta"), "rope_type": "default"}}
    limits = {kind: dict(sizes[kind]) for kind in ("vit", "vae")}
    tables = {name: every.pop(name) for name in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")}
    language = {
        name.removeprefix("language_model."): every.pop(name) for name in list(every) if "language_model" in name
    }
    words = {
        f"{name}.weight": language.pop(f"{at}{name}.weight")
        for at, name in (("model.", "embed_tokens"), ("", "lm_head"))
    }
    sight = {
        name.removeprefix("vit_model."): every.pop(name)
        for name in list(every)
        if name.startswith(("vit_", "connector"))
    }
    modules = {
        "bagel_text_encoder": ({"vocab_size": llm["vocab_size"], "tie_word_embeddings": False}, words),
        "bagel_qwen2_mot": (llm | rope | {"qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer"}, language),
        "bagel_siglip_navit": (
            vit
            | {
                "num_hidden_layers": vit["num_hidden_layers"] - 1,
                "rope": False,
                "min_image_size": limits["vit"]["min_size"],
            },
            sight | {"vit_pos_embed.pos_embed": tables["vit_pos_embed.pos_embed"]},
        ),
        "bagel_flow_connector": (
            {"latent_patch_size": 2, "max_latent_size": 8},
            every | {"latent_pos_embed.pos_embed": tables["latent_pos_embed.pos_embed"]},
        ),
        "bagel_vae": (
            top["vae_config"]
            | {"resolution": 256, "in_channels": 3, "out_ch": 3, "image_stride": limits["vae"]["stride"]}
            | {
                "max_image_size": limits["vae"]["max_size"],
                "min_image_size": limits["vae"]["min_size"],
                "freeze": True,
            },
            load_file(CHECKPOINT / "ae.safetensors"),
        ),
    }
    for name, (config, held) in modules.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config | {"model_type": name}))
        save_file(held, folder / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(CHECKPOINT / name, folder / "bagel_text_encoder")
    return folder


def fails(*words, kind=CheckpointError, **settings):
    with pytest.raises(kind) as refused:
        Checkpoint(**settings)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
