"""A checkpoint's sizes, written as its JSON files."""

import json
from pathlib import Path
from typing import Any

from bagel_opt.config import BagelConfig
from bagel_opt.files.replacing import replacing


def write_config(folder: Path, config: BagelConfig, **more: Any) -> None:
    """The JSON files of a checkpoint, as the official code reads them. more: other fields of config.json."""
    llm, vit, vae = config.llm, config.vit, config.vae
    llm_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_key_value_heads,
        "vocab_size": llm.vocab_size,
        "rope_theta": llm.rope_theta,
        "rms_norm_eps": llm.rms_norm_eps,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": config.special.bos_token_id,
        "eos_token_id": config.special.eos_token_id,
        "torch_dtype": "bfloat16",
    }
    vit_config = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "num_channels": vit.num_channels,
        "hidden_size": vit.hidden_size,
        "intermediate_size": vit.intermediate_size,
        "num_hidden_layers": vit.num_hidden_layers + 1,  # published configurations count one that does not run
        "num_attention_heads": vit.num_attention_heads,
        "layer_norm_eps": vit.layer_norm_eps,
        "image_size": round(vit.num_positions**0.5) * vit.patch_size,
        "patch_size": vit.patch_size,
    }
    vae_config = {
        "z_channels": vae.z_channels,
        "downsample": vae.downsample,
        "ch": vae.ch,
        "ch_mult": vae.ch_mult,
        "num_res_blocks": vae.num_res_blocks,
        "scale_factor": vae.scale_factor,
        "shift_factor": vae.shift_factor,
    }
    top = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "llm_config": llm_config,
        "vit_config": vit_config,
        "vae_config": vae_config,
        "visual_gen": True,
        "visual_und": True,
        "interpolate_pos": False,
        "connector_act": "gelu_pytorch_tanh",
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.latent_side,
        "vit_max_num_patch_per_side": config.vit_side,
        **({"generation": dict(config.generation)} if config.generation else {}),
        **more,
    }
    resize = {kind: vars(getattr(config, f"{kind}_resize")) for kind in ("vae", "vit")}
    for name, data in (
        ("config", top),
        ("llm_config", llm_config),
        ("vit_config", vit_config),
        ("preprocessor_config", resize),
    ):
        write_json(folder / f"{name}.json", data)


def write_json(path: Path, data: dict) -> None:
    """Whole, or what was there."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
