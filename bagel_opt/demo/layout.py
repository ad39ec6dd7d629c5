"""The sizes of the model that ships, and writing it in the published layout."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bagel_opt.config import BagelConfig, LLMConfig, ResizeConfig, SpecialTokens, VAEConfig, ViTConfig
from bagel_opt.demo.world import SIDE
from bagel_opt.files.checkpoint import VAE_FILE, published_tensors
from bagel_opt.files.replacing import replacing
from bagel_opt.files.written_config import write_json
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
    write_json(folder / "tokenizer_config.json", config)


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
