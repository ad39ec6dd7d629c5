"""A checkpoint in the published layout with random weights, of any sizes, for servers that know only that layout.

Its tokenizer gives each id a text of its own, so that what a server answers tells its tokens, whatever API it speaks.
"""

import itertools
import json
import os
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from bagel_opt.config import BagelConfig
from bagel_opt.files.checkpoint import VAE_FILE, published_shapes
from bagel_opt.files.parameters import parameter_shapes
from bagel_opt.files.torch_weights import write_weights
from bagel_opt.files.written_config import write_config, write_json

# Qwen2.5's added tokens from <|endoftext|> on, up to the last that a server looks for by name.
END = "<|endoftext|>"
ADDED = (
    END,
    *("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
)
LETTERS = 4  # of a word; 26**4 are more than any vocabulary here
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
REPO = "ByteDance-Seed/BAGEL-7B-MoT"
COMMIT = "0" * 40  # in a hub's folder


def write_checkpoint(
    folder: Path,
    config: BagelConfig,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the folder, tensor after tensor. The special tokens of `config` have to lie as the published ones do:
    <|im_start|> second of the added tokens. progress(done, total) in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    end = config.special.bos_token_id - 1
    if (config.special.eos_token_id, config.special.start_of_image) != (end + 2, end + 9):
        raise ValueError(f"{config.special}: the special tokens of the published model come in another order")
    write_config(folder, config)
    write_tokenizer(folder, end)
    shapes = published_shapes(config, parameter_shapes(config))
    total, done = sum(map(prod, shapes.values())) * dtype.itemsize, 0
    for file, prefix in (("ema.safetensors", ""), (VAE_FILE, "vae.")):
        own = {name: shape for name, shape in shapes.items() if name.startswith("vae.") == bool(prefix)}
        layout = [(name.removeprefix(prefix), shape, dtype) for name, shape in own.items()]

        def counted(own: dict[str, tuple[int, ...]] = own, prefix: str = prefix) -> Iterator[tuple[str, Tensor]]:
            nonlocal done
            for name, tensor in _tensors(own, dtype, seed, end):
                yield name.removeprefix(prefix), tensor
                done += tensor.nbytes
                progress(done, total)

        write_weights(folder / file, layout, counted())
    return folder


def _tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int, end: int
) -> Iterator[tuple[str, Tensor]]:
    """In order, a few of them being made at a time: one thread makes some 0.1 billion numbers a second."""
    coming = iter(shapes.items())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_made, *one, dtype, seed, end) for one in itertools.islice(coming, os.cpu_count() or 1)]
        for name in shapes:
            yield name, jobs.pop(0).result()
            jobs += [pool.submit(_made, *one, dtype, seed, end) for one in itertools.islice(coming, 1)]


def _made(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, end: int) -> Tensor:
    """Norms of 1, small biases, and products that keep the size of what they take. Each tensor has a seed of its own."""
    if len(shape) == 1 and ("norm" in name and name.endswith("weight")):
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(crc32(name.encode()) + seed)
    spread = 0.02 if len(shape) == 1 else 1.0 if name == EMBEDDING else prod(shape[1:]) ** -0.5
    made = torch.empty(shape, dtype=dtype)
    rows = max(1, 2**24 // prod(shape[1:]))
    for part in made.split(rows):  # made in float32, a part at a time
        part.copy_(torch.empty(part.shape).normal_(0, spread, generator=generator))
    if name == HEAD:
        # Only ids with a word of their own may be the likeliest: no answer ends early or cannot be told apart.
        made[: first_word()] = 0
        made[end:] = 0
    return made


# ---- words


def first_word() -> int:
    """The least id that is a word: those before are the bytes."""
    return len(pre_tokenizers.ByteLevel.alphabet())


def word(number: int) -> str:
    """The text of an id between `first_word` and <|endoftext|>: a blank and letters."""
    letters = []
    for _ in range(LETTERS):
        number, letter = divmod(number, 26)
        letters.append(string.ascii_lowercase[letter])
    return " " + "".join(reversed(letters))


def ids_of(text: str) -> list[int]:
    """What `word` made into text. Raises ValueError for any other text."""
    found = []
    for piece in text.split():
        if len(piece) != LETTERS or not piece.isascii() or not piece.islower():
            raise ValueError(f"{piece!r:.60} is no word of the random checkpoint's tokenizer")
        number = 0
        for letter in piece:
            number = number * 26 + string.ascii_lowercase.index(letter)
        found.append(number)
    return found


def write_tokenizer(folder: Path, end: int) -> None:
    """Qwen2's files, with <|endoftext|> at `end`: single bytes, then words, which only answers have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    vocabulary |= {"Ġ" + word(i)[1:]: i for i in range(len(alphabet), end)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.model.save(str(folder))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    made.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "eos_token": "<|im_end|>",
        "pad_token": END,
        "added_tokens_decoder": {str(end + i): {"content": token, **flags} for i, token in enumerate(ADDED)},
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_hub(hub: Path, checkpoint: Path, **changed: int) -> None:
    """The cache folder of huggingface_hub in which REPO is this checkpoint, for servers that take models by name alone.
    changed: fields of config.json there."""
    home = hub / f"models--{REPO.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for path in checkpoint.iterdir():
        link = snapshot / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    (snapshot / "config.json").unlink()
    said = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    write_json(snapshot / "config.json", {**said, **changed})
