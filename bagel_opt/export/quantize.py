"""Writing a checkpoint in 8 or 4 bits: a folder in the published layout, with codes in place of weights and their scales beside
them."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bagel_opt.examples import copy_examples
from bagel_opt.export.placing import check_new, check_space, put_new
from bagel_opt.files import lance
from bagel_opt.files.adapters import Loras
from bagel_opt.files.checkpoint import Checkpoint, part_rows, published_names
from bagel_opt.files.finding import SCALE, VAE_FILE, quantization_config
from bagel_opt.files.manifest import TOKENIZER
from bagel_opt.files.parameters import kind_of
from bagel_opt.files.torch_weights import Layout, write_weights
from bagel_opt.files.written_config import write_config
from bagel_opt.loading import shipped_model
from bagel_opt.model.families import build
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.quantized import to_kind
from bagel_opt.quantization import KINDS, Quantization, Shape, kinds_of_parts

TRANSFORMER = "model.safetensors"
log = logging.getLogger("bagel_opt")


def quantize(
    checkpoint: str | Path | None,
    out: str | Path,
    quantization: Quantization,
    *,
    weights: str | Path | None = None,
    lora: Loras = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes a checkpoint (None: the model that ships) in 8 or 4 bits to the folder `out` and returns it. `load` reads it as it
    is, and answers as with `load(checkpoint, quantization=...)`, to the bit.

    quantization, weights, lora: as for `load`. What is in none of the parts that are quantised is written as it was stored,
    and in float32 where an adapter changed it. No more than one parameter is in memory. progress(done, total) in parameters.

    `out` may be empty or absent, and is there once it is whole. Raises ValueError for a bad argument, FileExistsError where
    `out` holds something or another export to it runs, OSError where the disk is full, and what `load` raises for the
    checkpoint.
    """
    kinds, out = kinds_of_parts(quantization), Path(out).resolve()
    if not kinds:
        raise ValueError(f"quantization={quantization!r} leaves all as it is; name a kind, or a part and its kind")
    check_new(out)  # before a repository is downloaded
    source = Checkpoint(shipped_model() if checkpoint is None else checkpoint, weights, lora)
    for note in source.notes:
        log.info(note)
    if source.kinds:
        raise ValueError(f"{source.folder} is quantised already; quantise the checkpoint that it was made from")
    with torch.device("meta"):
        plain = build(source.config)
    is_lance = source.config.family == "lance"
    inner = source.folder.name if source.folder.name in lance.LLMS else next(iter(lance.LLMS))
    home, vae = (inner, lance.VAE_FILE) if is_lance else (".", VAE_FILE)  # of the transformer, and the VAE's file
    layouts: dict[str, Layout] = {f"{home}/{TRANSFORMER}": [], vae: []}
    for name, shape, dtype in _layout(source, plain, kinds):
        file = vae if name.startswith("vae.") else f"{home}/{TRANSFORMER}"
        layouts[file].append((name.removeprefix("vae."), shape, dtype))
    size = sum(prod(shape) * dtype.itemsize for layout in layouts.values() for _, shape, dtype in layout)
    with put_new(out) as partial:
        check_space(out, size)  # now that what killed runs left is gone
        said = {"quantization_config": quantization_config(kinds)}
        if is_lance:
            lance.write_config(partial, home, source.folder, source.config, **said)
        else:
            write_config(partial, source.config, **said)
        source.tokenizer.write(partial / home / TOKENIZER)
        copy_examples(source.folder, partial / home)
        tensors = _tensors(source, plain, kinds, progress)
        for file, layout in layouts.items():  # the VAE is a model's last part
            write_weights(partial / file, layout, islice(tensors, len(layout)))
    return out


def _layout(source: Checkpoint, plain: Mixture, kinds: dict[str, str]) -> Iterator[tuple[str, Shape, torch.dtype]]:
    for name, parameter in plain.named_parameters():
        names, kind = published_names(name), kind_of(name, parameter.shape, kinds)
        for part, rows in zip(names, part_rows(source.config, name, len(names), parameter.shape[0]), strict=True):
            shape = (rows, *parameter.shape[1:])
            if kind is None:
                yield part, shape, source.dtype(part)
                continue
            stored = KINDS[kind]
            codes, scale = stored.shapes(shape)
            yield part, codes, getattr(torch, stored.codes)
            yield _scale(part), scale, getattr(torch, stored.scale)


def _tensors(
    source: Checkpoint, plain: Mixture, kinds: dict[str, str], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Of `_layout`, but for "vae."."""
    total = len([*plain.parameters()])
    for done, (name, parts) in enumerate(source.read(plain)):
        progress(done + 1, total)
        kind = kind_of(name, plain.get_parameter(name).shape, kinds)
        for part, tensor in zip(published_names(name), parts, strict=True):
            if kind is None:
                yield part.removeprefix("vae."), tensor
            else:
                yield from zip((part, _scale(part)), to_kind(tensor, kind), strict=True)


def _scale(weight: str) -> str:
    return weight.removesuffix(".weight") + SCALE
