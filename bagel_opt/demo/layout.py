"""The sizes of the model that ships, and writing it in the published layout."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bagel_opt.config import BagelConfig, LLMConfig, ResizeConfig, SpecialTokens, VAEConfig, ViTConfig
from bagel_opt.demo.world import SIDE
from bagel_opt.files.checkpoint import VAE_FILE, published_tensors
from bagel_opt.files.replacing import replacing
from bagel_opt.model.bagel import Bagel
from bagel_opt.tokenizer import SPECIAL

VOCABULARY = 768
PATCH = 16  # pixels of a ViT patch and of a latent token: pictures are 8 x 8 of either
GRID = SIDE // PATCH
# How Qwen2's tokenizer cuts text into words (https://huggingface.co/Qwen/Qwen2.5-7B, tokenizer.json).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"


def demo_config(special: SpecialTokens) -> BagelConfig:
    """11 million parameters, 3.9 in each expert. The VAE keeps FLUX's depth and its 16 channels."""
    return BagelConfig(
        llm=LLMConfig(
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        ),
        vit=ViTConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            patch_size=PATCH,
            num_positions=GRID**2,
        ),
        vae=VAEConfig(ch=64, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        vae_resize=ResizeConfig(SIDE, SIDE // 2, PATCH),
        vit_resize=ResizeConfig(SIDE, SIDE // 2, PATCH),
        special=special,
        latent_side=GRID,
        vit_side=GRID,
    )


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Trains a byte-level BPE on texts and writes it as Qwen2's files: tokenizer.json, vocab.json, merges.txt and
    tokenizer_config.json, with BAGEL's special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCABULARY - len(SPECIAL) - 1
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.model.save(str(folder))
    special = [END, *SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in special}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "bos_token": None,
        "eos_token": SPECIAL[1],
        "pad_token": END,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL),
        "added_tokens_decoder": added,
    }
    _json(folder / "tokenizer_config.json", config)


def write_config(folder: Path, config: BagelConfig) -> None:
    """The JSON files of a checkpoint, as the official code reads them."""
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
        "image_size": config.vit_side * vit.patch_size,
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
    }
    resize = {kind: vars(getattr(config, f"{kind}_resize")) for kind in ("vae", "vit")}
    for name, data in (
        ("config", top),
        ("llm_config", llm_config),
        ("vit_config", vit_config),
        ("preprocessor_config", resize),
    ):
        _json(folder / f"{name}.json", data)


def write_checkpoint(folder: Path, model: Bagel) -> None:
    """The weights as ema.safetensors and ae.safetensors, in bfloat16, under the published names."""
    files: dict[str, dict[str, torch.Tensor]] = {"ema.safetensors": {}, VAE_FILE: {}}
    for name, tensor in published_tensors(model):
        file = VAE_FILE if name.startswith("vae.") else "ema.safetensors"
        files[file][name.removeprefix("vae.")] = tensor.to("cpu", torch.bfloat16).contiguous()
    for file, tensors in files.items():
        with replacing(folder / file) as partial:
            save_file(tensors, partial)
            partial.chmod(0o644)  # it comes readable by its owner alone


def _json(path: Path, data: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
