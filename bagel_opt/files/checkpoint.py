"""Reading a checkpoint in the published layout: a folder, or a Hugging Face repo id."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bagel_opt.config import BagelConfig
from bagel_opt.dtypes import STORED
from bagel_opt.errors import CheckpointError
from bagel_opt.files.adapters import Loras, with_factors
from bagel_opt.files.checkpoint_config import read_config, read_generation
from bagel_opt.files.finding import VAE_FILE, check_layout, find_place, transformer_files
from bagel_opt.files.lora import Lora
from bagel_opt.files.parameters import Shapes, compare, parameter_shapes
from bagel_opt.files.torch_weights import Reader
from bagel_opt.files.weights import Location, locate_weights
from bagel_opt.model.bagel import Bagel
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


COMPUTED = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}  # fixed tables, which may be absent


def published_names(name: str) -> tuple[str, ...]:
    """The published tensors that one of our parameters is made of, stacked along the first dimension."""
    if match := re.fullmatch(r"llm\.layers\.(\d+)\.(und|gen)\.(\w+)\.(weight|bias)", name):
        layer, expert, part, kind = match.groups()
        gen = "_moe_gen" if expert == "gen" else ""
        prefix = f"language_model.model.layers.{layer}."
        return tuple(f"{prefix}{source.format(gen=gen)}.{kind}" for source in LAYER_PARTS[part])
    if match := re.fullmatch(r"vit_encoder\.layers\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return tuple(f"{VIT}encoder.layers.{layer}.{source}.{kind}" for source in VIT_PARTS[part])
    # The VAE's file names its tensors without a prefix; the connector's names are the same here and there.
    return (OTHERS.get(name, name),)


def part_rows(config: BagelConfig, name: str, parts: int, rows: int) -> tuple[int, ...]:
    """How the rows of one of our parameters divide among the published tensors stacked in it."""
    if parts == 3 and name.startswith("llm."):  # fewer heads of keys and values than of queries
        keys = config.llm.num_key_value_heads * config.llm.head_dim
        return rows - 2 * keys, keys, keys
    return (rows // parts,) * parts


def published_tensors(model: Bagel) -> Iterator[tuple[str, torch.Tensor]]:
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


class Checkpoint:
    """A checkpoint folder: where each tensor is, its shape and dtype. Nothing is read but headers and JSON.

    weights: a file or a folder whose tensors count in place of the folder's; what it lacks comes from there. lora: adapters
    that are merged into the weights as these are read. notes: lines on which files were chosen, for the user.
    Raises FileNotFoundError for a missing file or folder and CheckpointError for one that cannot be read, or whose tensors
    are not those of its sizes.
    """

    def __init__(self, source: str | Path, weights: str | Path | None = None, lora: Loras = ()):
        self.folder = find_place(source)
        if self.folder.is_file():
            raise CheckpointError(
                f"{source} is a file; give a model's folder, and over it, if it is some, this as weights"
            )
        self.notes: list[str] = []
        self.places: dict[str, tuple[Path, str]] = {}  # published name -> file, and name there
        self.tensors: dict[str, Location] = {}
        self.about = f"{self.folder}" if weights is None else f"{weights} over {self.folder}"
        self._find(self.folder, needed=weights is None)
        if weights is not None:
            before, place = self.tensors, find_place(weights)
            self.tensors = {}
            self._find(place)
            replaced = len(self.tensors)
            self.tensors = before | self.tensors
            self.notes.append(f"{replaced} tensors are of {place}, {len(self.tensors) - replaced} of {self.folder}")
        if not any(name.startswith("vae.") for name in self.tensors):
            raise FileNotFoundError(
                f"{self.folder / VAE_FILE} is missing; copy the published one there, or give this as weights over a folder that has it"
            )
        self.tokenizer = Tokenizer(self.folder / "tokenizer.json")
        shapes = {name: place.shape for name, place in self.tensors.items()}
        config = read_config(self.folder, shapes, self.tokenizer.special)
        folders = [self.folder, *([place] if weights is not None and place.is_dir() else [])]
        self.config: BagelConfig = dataclasses.replace(config, generation=read_generation(*folders))
        rows = self.config.llm.vocab_size
        if (top := self.tokenizer.largest_id) >= rows:
            raise CheckpointError(
                f"{self.folder}: the tokenizer has token {top}, but the embedding table only {rows} rows"
            )
        self._compare(parameter_shapes(self.config))
        self.adapters = [Lora(find_place(place), factor, self.tensors) for place, factor in with_factors(lora)]

    def _find(self, place: Path, needed: bool = True) -> None:
        """Adds the tensors of a folder or a file. needed: whether there must be those of the transformer."""
        try:
            files, others = transformer_files(place)
        except FileNotFoundError:
            if needed:
                raise
            files, others = [], []
        if others:
            named = ", ".join(path.name for path in others)
            self.notes.append(
                f"taking {files[0].name} of {place}; there is {named} too, which weights={others[0]} would take"
            )
        if (place / VAE_FILE).is_file():
            files = [*files, place / VAE_FILE]
        for path in files:
            if not path.is_file():
                if not needed:  # an index that was copied along
                    continue
                raise FileNotFoundError(f"{path} is missing; copy the whole checkpoint there")
            found, prefix = locate_weights(path, CheckpointError), "vae." if path.name == VAE_FILE else ""
            check_layout(path, found)
            for name, at in found.items():
                if prefix + name in self.tensors:
                    raise CheckpointError(
                        f"{path} and {self.places[prefix + name][0].name} both have tensor {name:.200}"
                    )
                self.places[prefix + name], self.tensors[prefix + name] = (path, name), at

    def check(self, model: Bagel) -> None:
        """Compares all names and shapes with a model. Raises CheckpointError listing what differs."""
        self._compare({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})

    def _compare(self, parameters: Shapes) -> None:
        want: Shapes = {}
        for name, shape in parameters.items():
            sources = published_names(name)
            for source, rows in zip(sources, part_rows(self.config, name, len(sources), shape[0]), strict=True):
                want[source] = (rows, *shape[1:])
        patch = "vit_model.vision_model.embeddings.patch_embedding.weight"
        c = self.config.vit
        if patch in self.tensors and len(self.tensors[patch].shape) == 4:
            want[patch] = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size)
        last = self.config.vit.num_hidden_layers
        unused = re.compile(UNUSED.replace("{last}", str(last)))
        have = {name: place for name, place in self.tensors.items() if name in want or not unused.match(name)}
        for name in COMPUTED - have.keys():
            del want[name]
        compare(self.about, have, want, STORED, CheckpointError)

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Bagel:
        """Builds the model and copies each tensor once, from the mapped file straight to its dtype and place.

        progress(done, total) is called in parameters read.
        """
        with torch.device("meta"):
            model = Bagel(self.config)
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        parameters = dict(model.named_parameters())
        for done, (name, parts) in enumerate(self.read(model)):
            start = 0
            for part in parts:
                parameters[name].data[start : start + len(part)].copy_(part)
                start += len(part)
            progress(done + 1, len(parameters))
        return model

    def read(self, model: Bagel) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Reads parameter after parameter of a model that may be on the meta device: its name, and the tensors to be
        stacked in it, in the file's dtype."""
        with contextlib.closing(Reader(CheckpointError)) as reader:
            for name, parameter in model.named_parameters():
                parts = [self._tensor(reader, part, parameter) for part in published_names(name)]
                if parts[0].ndim == 4 and parameter.ndim == 2:  # a convolution over patches: (row, column, channel)
                    parts = [parts[0].permute(0, 2, 3, 1).reshape(parameter.shape)]
                yield name, parts

    def _tensor(self, reader: Reader, name: str, like: torch.Tensor) -> torch.Tensor:
        if name not in self.places:  # one of COMPUTED
            return sine_table(*like.shape)
        tensor = reader.read(*self.places[name])
        if tensor.dtype == torch.float8_e4m3fn:  # a plain cast, of which bfloat16 holds each number
            tensor = tensor.bfloat16()
        for adapter in self.adapters:
            if name in adapter.pairs:  # rounded once, at the end, as peft rounds it
                tensor = tensor.float() + adapter.delta(name)
        return tensor
