"""LoRA adapters as the peft library writes them (https://huggingface.co/docs/peft): what each changes, and its factors."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from bagel_opt.errors import CheckpointError
from bagel_opt.files.finding import find_place
from bagel_opt.files.torch_weights import Reader
from bagel_opt.files.weights import locate_weights
from bagel_opt.json_files import read_json

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
LANGUAGE = "language_model.model."
# What other kinds of adapters say in their configuration. The value is what a plain LoRA has.
PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}


ALLOWED = "the folder that peft wrote, the file in it, or the repo id of such a folder"


class Pair(NamedTuple):
    """The factors of one weight: their names in the file, their rank, and by what their product is multiplied."""

    down: str
    up: str
    rank: int
    scale: float


class Lora:
    """An adapter: of each weight that it changes, by its published name, the two factors and their scale.

    given: a folder, the file in one, or a repo id. shapes: of the weights that it may change. Raises FileNotFoundError and CheckpointError.
    """

    def __init__(self, given: str | Path, factor: float, shapes: Mapping[str, tuple[int, ...]]):
        place = find_place(given, ALLOWED)
        self.path = place if place.is_file() else place / FILE
        if not self.path.is_file():
            raise FileNotFoundError(f"{place} has no {FILE}; give the folder that peft wrote, or the file in it")
        self.factor = factor
        self.pairs: dict[str, Pair] = {}
        config = self._config()
        halves: dict[str, dict[str, str]] = {}
        found = locate_weights(self.path, CheckpointError)
        for name in found:
            if not (match := KEY.fullmatch(name)):
                raise CheckpointError(
                    f"{self.path}: {name:.200} is of no plain LoRA, which has lora_A and lora_B alone"
                )
            halves.setdefault(match["module"], {})[match["half"]] = name
        for module, pair in halves.items():
            weight = self._weight(module, shapes)
            if set(pair) != {"A", "B"} or weight in self.pairs:
                raise CheckpointError(f"{self.path}: {module:.200} has not one lora_A and one lora_B")
            rank, scale = self._scale(config, module)
            down, up = found[pair["A"]].shape, found[pair["B"]].shape
            rows, columns = shapes[weight]
            if (down, up) != ((rank, columns), (rows, rank)):
                raise CheckpointError(
                    f"{self.path}: {module:.200} has factors of {down} and {up}; for {weight} of {rows}x{columns} and "
                    f"rank {rank} they must be {(rank, columns)} and {(rows, rank)}: it is for another model, or not whole"
                )
            self.pairs[weight] = Pair(pair["A"], pair["B"], rank, factor * scale)
        if not self.pairs:
            raise CheckpointError(f"{self.path} changes no weight")

    def __str__(self) -> str:
        counts = f" {self.factor:g} times" if self.factor != 1 else ""
        return f"adapter {self.path.parent.name}{counts}: changes {len(self.pairs)} weights"

    def delta(self, weight: str) -> torch.Tensor:
        """What is added to a weight, in float32."""
        down, up = self.factors(weight, Reader(CheckpointError))
        return (up.float() @ down.float()) * self.pairs[weight].scale

    def factors(self, weight: str, reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
        """(lora_A, lora_B) of a weight, in the file's dtype."""
        pair = self.pairs[weight]
        return reader.read(self.path, pair.down), reader.read(self.path, pair.up)

    def _config(self) -> dict:
        path = self.path.parent / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it says how much of the adapter counts")
        config = read_json(path, CheckpointError)
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} holds {type(config).__name__}, not an object of fields")
        for name, plain in PLAIN.items():
            if config.get(name, plain) != plain:
                raise CheckpointError(
                    f"{path}: {name} is {config[name]!r:.60}; bagel_opt takes plain LoRA, which has {plain!r}"
                )
        if config.get("modules_to_save"):
            raise CheckpointError(
                f"{path}: modules_to_save are whole weights; merge them with peft, and give those as weights"
            )
        return config

    def _scale(self, config: dict, module: str) -> tuple[int, float]:
        """(rank, factor), which patterns may set for some modules."""
        values = []
        for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            value, patterns = config.get(name), config.get(pattern) or {}
            for key, other in patterns.items() if isinstance(patterns, dict) else ():
                if module == key or module.endswith(f".{key}"):
                    value = other
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 2**16:
                raise CheckpointError(
                    f"{self.path.parent / CONFIG}: {name} is {value!r:.60}; it must be a number above 0"
                )
            values.append(value)
        rank, alpha = values
        return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def _weight(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The published weight of a module. Adapters name it from the model's root, from the language model, or from its
        layers on, after peft's own "base_model.model."."""
        parts = module.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            for name in (f"{rest}.weight", f"language_model.{rest}.weight", f"{LANGUAGE}{rest}.weight"):
                if len(shapes.get(name, ())) == 2:
                    return name
        near = difflib.get_close_matches(f"{module}.weight", shapes, n=2, cutoff=0.5)
        named = f"; nearest: {', '.join(near)}" if near else ""
        raise CheckpointError(
            f"{self.path} is for another model: it changes {module:.200}, which this one has not{named}"
        )
