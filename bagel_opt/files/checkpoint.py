"""Reading a checkpoint in the published layout: a folder, or a Hugging Face repo id."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch

from bagel_opt.dtypes import STORED
from bagel_opt.errors import CheckpointError
from bagel_opt.files import lance, veomni
from bagel_opt.files.adapters import Loras, with_factors
from bagel_opt.files.checkpoint_config import read_config, read_generation
from bagel_opt.files.collecting import beside, collect
from bagel_opt.files.comfyui import check_tokenizer
from bagel_opt.files.dfloat11 import Part
from bagel_opt.files.finding import SCALE, VAE_FILE, find_place
from bagel_opt.files.lora import Lora
from bagel_opt.files.parameters import Shapes, compare, parameter_shapes, quantized_shapes, stored_dtypes
from bagel_opt.files.torch_weights import Reader
from bagel_opt.lance.config import Config
from bagel_opt.model.families import build
from bagel_opt.model.mixture import Mixture
from bagel_opt.tokenizer import Tokenizer

# SigLIP's last layer and its pooling head take no part in BAGEL; some conversions carry them along, and buffers that are
# computed, not learned.
UNUSED = r"vit_model\.vision_model\.(head\.|encoder\.layers\.{last}\.)|.*\.(inv_freq|position_ids)$"

LAYER_PARTS = {
    "norm1": ("input_layernorm{gen}",),
    "qkv": ("self_attn.q_proj{gen}", "self_attn.k_proj{gen}", "self_attn.v_proj{gen}"),
    "q_norm": ("self_attn.q_norm{gen}",),
    "k_norm": ("self_attn.k_norm{gen}",),
    "o": ("self_attn.o_proj{gen}",),
    "norm2": ("post_attention_layernorm{gen}",),
    "gate_up": ("mlp{gen}.gate_proj", "mlp{gen}.up_proj"),
    "down": ("mlp{gen}.down_proj",),
}
VIT_PARTS = {
    "norm1": ("layer_norm1",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
VIT = "vit_model.vision_model."
OTHERS = {
    "llm.embed.weight": "language_model.model.embed_tokens.weight",
    "llm.norm_und.weight": "language_model.model.norm.weight",
    "llm.norm_gen.weight": "language_model.model.norm_moe_gen.weight",
    "llm.lm_head.weight": "language_model.lm_head.weight",
    "vit_encoder.patch.weight": VIT + "embeddings.patch_embedding.weight",
    "vit_encoder.patch.bias": VIT + "embeddings.patch_embedding.bias",
    "vit_encoder.position.weight": VIT + "embeddings.position_embedding.weight",
    "vit_encoder.norm.weight": VIT + "post_layernorm.weight",
    "vit_encoder.norm.bias": VIT + "post_layernorm.bias",
    "vit_position.weight": "vit_pos_embed.pos_embed",
    "latent_position.weight": "latent_pos_embed.pos_embed",
    "time.fc1.weight": "time_embedder.mlp.0.weight",
    "time.fc1.bias": "time_embedder.mlp.0.bias",
    "time.fc2.weight": "time_embedder.mlp.2.weight",
    "time.fc2.bias": "time_embedder.mlp.2.bias",
    **{f"latent_in.{kind}": f"vae2llm.{kind}" for kind in ("weight", "bias")},
    **{f"latent_out.{kind}": f"llm2vae.{kind}" for kind in ("weight", "bias")},
}


# Codes take the place of a weight, and their scales lie beside it, as compressed-tensors and others have them.
QUANTIZED = {"quantized.codes": "weight", "quantized.scale": SCALE.removeprefix(".")}
ENDINGS = rf"(weight|bias|{'|'.join(map(re.escape, QUANTIZED))})"
COMPUTED = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}  # fixed tables, which may be absent


def published_names(name: str) -> tuple[str, ...]:
    """The published tensors that one of our parameters is made of, stacked along the first dimension."""
    if match := re.fullmatch(rf"llm\.layers\.(\d+)\.(und|gen)\.(\w+)\.{ENDINGS}", name):
        layer, expert, part, kind = match.groups()
        kind = QUANTIZED.get(kind, kind)
        gen = "_moe_gen" if expert == "gen" else ""
        prefix = f"language_model.model.layers.{layer}."
        return tuple(f"{prefix}{source.format(gen=gen)}.{kind}" for source in LAYER_PARTS[part])
    if match := re.fullmatch(rf"vit_encoder\.layers\.(\d+)\.(\w+)\.{ENDINGS}", name):
        layer, part, kind = match.groups()
        kind = QUANTIZED.get(kind, kind)
        return tuple(f"{VIT}encoder.layers.{layer}.{source}.{kind}" for source in VIT_PARTS[part])
    if match := re.fullmatch(r"(llm\.(?:lm_head|embed)\.)(quantized\.\w+)", name):
        return (OTHERS[f"{match[1]}weight"].removesuffix("weight") + QUANTIZED[match[2]],)
    if re.match(r"vit_encoder\.(patch_embed|blocks|merger)\.", name):  # Qwen2.5-VL's
        kind = next((kind for kind in QUANTIZED if name.endswith(kind)), "")
        return ("vit_model." + name.removeprefix("vit_encoder.").removesuffix(kind) + QUANTIZED.get(kind, ""),)
    # The VAE's file names its tensors without a prefix; the connector's names are the same here and there.
    return (OTHERS.get(name, name),)


def part_rows(config: Config, name: str, parts: int, rows: int) -> tuple[int, ...]:
    """How the rows of one of our parameters divide among the published tensors stacked in it."""
    if parts == 3 and name.startswith("llm."):  # fewer heads of keys and values than of queries
        keys = config.llm.num_key_value_heads * config.llm.head_dim
        return rows - 2 * keys, keys, keys
    return (rows // parts,) * parts


def published_tensors(model: Mixture) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters as the tensors of a checkpoint, under their published names; the VAE's begin with "vae."."""
    for name, parameter in model.named_parameters():
        sources = published_names(name)
        rows = part_rows(model.config, name, len(sources), parameter.shape[0])
        yield from zip(sources, parameter.detach().split(rows), strict=True)


def sine_table(rows: int, channels: int) -> torch.Tensor:
    """The fixed table of positions in a square grid, row by row: of each, sines and cosines of its column, then of its row,
    at channels / 4 frequencies from 1 down to 1/10000 (Vaswani et al. 2017, in two dimensions as in MAE)."""
    side, count = round(rows**0.5), channels // 4
    frequencies = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    row, column = (x.double() for x in (torch.arange(rows) // side, torch.arange(rows) % side))
    angles = [place[:, None] * frequencies for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def published_shapes(config: Config, parameters: Shapes) -> Shapes:
    """The tensors of a checkpoint under their published names, from parameters of a model of these sizes."""
    found: Shapes = {}
    for name, shape in parameters.items():
        sources = published_names(name)
        for source, rows in zip(sources, part_rows(config, name, len(sources), shape[0]), strict=True):
            found[source] = (rows, *shape[1:])
    return found


class Checkpoint:
    """A checkpoint: where each tensor is, its shape and dtype. Nothing is read but headers, JSON and DFloat11's tables.

    source: a folder, or a file in one, which then counts alone, with the tokenizer, the VAE and the JSON files that are
    beside it. weights: a file or a folder whose tensors count in place of the source's; what it lacks comes from there.
    lora: adapters that are merged into the weights as these are read. notes: lines on which files were chosen, for the user.
    kinds: of the parts that are quantised there, whose weights can be neither replaced nor adapted.
    Raises FileNotFoundError for a missing file or folder and CheckpointError for one that cannot be read, or whose tensors
    are not those of its sizes.
    """

    def __init__(self, source: str | Path, weights: str | Path | None = None, lora: Loras = ()):
        place = find_place(source)
        self.folder = place.parent if place.is_file() else place
        self.about = f"{place}" if weights is None else f"{weights} over {place}"
        if transformer := lance.find_transformer(place):
            self.folder = transformer
            found = lance.collect(transformer)
        else:
            found = collect(place, needed=weights is None).over(beside(place))
        if weights is None:
            veomni.check_whole(place)
        else:
            over = collect(above := find_place(weights, "a fine-tune's file, folder or repo id"))
            if over.kinds:
                raise CheckpointError(
                    f"{above} is a whole quantised model; give it as the checkpoint, without other weights below it"
                )
            self._plain(place, found.kinds, "weights")
            found = over.over(found)
            rest = len(found.tensors) - len(over.tensors)
            found.notes.append(f"{len(over.tensors)} tensors are of {above}, {rest} of {place}")
        if lora:
            self._plain(place, found.kinds, "lora")
        self.notes, self.places, self.tensors, self.kinds = found.notes, found.places, found.tensors, found.kinds
        if not any(name.startswith("vae.") for name in self.tensors):
            raise FileNotFoundError(
                f"{self.folder / VAE_FILE} is missing; copy the published one there, or give this as weights over a folder that has it"
            )
        words = self.folder / veomni.TEXT if veomni.modules(self.folder) else self.folder
        self.tokenizer = Tokenizer(words / "tokenizer.json")
        for path, said in found.comfyui.items():
            check_tokenizer(path, said, self.tokenizer.special)
        shapes = {name: at.shape for name, at in self.tensors.items()}
        if transformer:
            config = lance.read_config(transformer, shapes, self.tokenizer.special, self.tokenizer.largest_id + 1)
        else:
            config = read_config(self.folder, shapes, self.tokenizer.special, found.given)
        folders = [self.folder, *([above] if weights is not None and above.is_dir() else [])]
        self.config: Config = replace(config, generation={**config.generation, **read_generation(*folders)})
        rows = self.config.llm.vocab_size
        if (top := self.tokenizer.largest_id) >= rows:
            raise CheckpointError(
                f"{self.folder}: the tokenizer has token {top}, but the embedding table only {rows} rows"
            )
        self._compare(quantized_shapes(parameter_shapes(self.config), self.kinds))
        shapes = {name: at.shape for name, at in self.tensors.items()}  # now those of DFloat11 too
        self.adapters = [Lora(path, factor, shapes) for path, factor in with_factors(lora)]

    @staticmethod
    def _plain(place: Path, kinds: Mapping[str, str], argument: str) -> None:
        if kinds:
            raise CheckpointError(
                f"{place} is quantised, and {argument} go into plain weights: load what it was made from with {argument} and "
                f"quantization, or `bagel-opt quantize` that with --{argument}"
            )

    def check(self, model: Mixture) -> None:
        """Compares all names and shapes with a model. Raises CheckpointError listing what differs."""
        self._compare({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})

    def _compare(self, parameters: Shapes) -> None:
        want = published_shapes(self.config, parameters)
        patch = "vit_model.vision_model.embeddings.patch_embedding.weight"
        c = self.config.vit
        if patch in want and patch in self.tensors and len(self.tensors[patch].shape) == 4:
            want[patch] = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size)
        last = self.config.vit.num_hidden_layers
        unused = re.compile(UNUSED.replace("{last}", str(last)))
        have = {name: place for name, place in self.tensors.items() if name in want or not unused.match(name)}
        for name in COMPUTED - have.keys():
            want.pop(name, None)
        for name, at in have.items():  # groups say how many numbers there are, not their shape
            if isinstance(self.places[name], Part) and name in want and at.shape == (prod(want[name]),):
                self.tensors[name] = have[name] = replace(at, shape=want[name])
        compare(self.about, have, want, STORED, CheckpointError, self._fixed(parameters))

    def _fixed(self, parameters: Shapes) -> dict[str, str]:
        """The dtypes of codes and scales, by their published names."""
        dtypes = stored_dtypes(parameters, self.kinds)
        return {source: dtype for name, dtype in dtypes.items() for source in published_names(name)}

    def check_kinds(self, kinds: Mapping[str, str]) -> None:
        """Raises CheckpointError where the file is quantised, and in other kinds than these."""
        if self.kinds and kinds and dict(kinds) != self.kinds:
            raise CheckpointError(
                f"{self.folder} is quantised, {self.kinds}, which quantization={dict(kinds)} cannot change; leave that out"
            )

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] = lambda done, total: None,
        kinds: Mapping[str, str] = MappingProxyType({}),
        on_host: Callable[[str], bool] = lambda name: False,
    ) -> Mixture:
        """Builds the model and copies each tensor once, from the mapped file straight to its dtype and place. kinds: of the
        parts whose weights are quantised as they come, so that no more than one is there as it was; where the file is
        quantised, its own, or none. on_host: whether a parameter is to lie there and not on the device, which quantises it
        all the same.

        progress(done, total) is called in parameters read. Raises CheckpointError for other kinds than the file's.
        """
        self.check_kinds(kinds)
        with torch.device("meta"):
            model, there = build(self.config).to(dtype), build(self.config)
        model.quantize(kinds or self.kinds)
        there.quantize(self.kinds)
        for name, module in model.named_modules():
            module.to_empty(device="cpu" if on_host(f"{name}.") else device, recurse=False)
        model.eval().requires_grad_(False)
        parameters, total = dict(model.named_parameters()), len([*there.parameters()])
        for done, (name, parts) in enumerate(self.read(there)):
            if name in parameters:
                start = 0
                for part in parts:
                    parameters[name].data[start : start + len(part)].copy_(part)
                    start += len(part)
            else:
                model.get_submodule(name.removesuffix(".weight")).quantized.store(torch.cat(parts).to(device))
            progress(done + 1, total)
        return model

    def read(self, model: Mixture) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Reads parameter after parameter of a model that may be on the meta device: its name, and the tensors to be
        stacked in it, in the file's dtype."""
        reader = Reader(CheckpointError)
        for name, parameter in model.named_parameters():
            parts = [self._tensor(reader, part, parameter) for part in published_names(name)]
            if parts[0].ndim == 5 and parameter.ndim == 2:  # over patches of two frames, in the file's own order
                parts = [parts[0].flatten(1)]
            if parts[0].ndim == 4 and parameter.ndim == 2:  # a convolution over patches: (row, column, channel)
                parts = [parts[0].permute(0, 2, 3, 1).reshape(parameter.shape)]
            yield name, parts

    def dtype(self, name: str) -> torch.dtype:
        """In which `read` gives a published tensor, where it is not quantised."""
        if name not in self.places or any(name in adapter.pairs for adapter in self.adapters):
            return torch.float32
        stored = getattr(torch, self.tensors[name].dtype.name)
        return torch.bfloat16 if stored == torch.float8_e4m3fn else stored

    def _tensor(self, reader: Reader, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.places:  # one of COMPUTED
            return sine_table(*like.shape)
        place = self.places[name]
        tensor = place.read().view(self.tensors[name].shape) if isinstance(place, Part) else reader.read(*place)
        if tensor.dtype == torch.float8_e4m3fn != like.dtype:  # a plain cast, of which bfloat16 holds each number
            tensor = tensor.bfloat16()
        for adapter in self.adapters:
            if name in adapter.pairs:  # rounded once, at the end, as peft rounds it
                tensor = tensor.float() + adapter.delta(name)
        return tensor
