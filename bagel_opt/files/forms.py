"""What a file or a folder is that somebody published, and what it lacks to be loaded: from names, headers and JSON."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from bagel_opt.errors import CheckpointError
from bagel_opt.files import veomni
from bagel_opt.files.collecting import Weights, beside, collect
from bagel_opt.files.dfloat11 import Part
from bagel_opt.files.finding import OTHER_FORMATS, VAE_FILE, other_layout, transformer_files
from bagel_opt.files.lora import CONFIG, FILE
from bagel_opt.files.weights import Location, locate_weights
from bagel_opt.json_files import read_json

BASE = "ByteDance-Seed/BAGEL-7B-MoT"
INSTEAD = "the same weights as *.safetensors, in 16 bits or in FP8 without scales"
# Parts of a model, and how their tensors are named.
PARTS = {
    "the understanding expert": r"language_model\.(?!.*_moe_gen)",
    "the generation expert": r"language_model\..*_moe_gen\.",
    "the ViT": r"vit_model\.",
    "what connects them": r"(vae2llm|llm2vae|time_embedder|connector)\.",
    f"the VAE ({VAE_FILE})": r"vae\.",
}


@dataclass(frozen=True)
class Form:
    """what: it is, in words. lacks: what it needs to be loaded, each in words. arguments: of the commands that use it; none
    where they cannot. tensors: those that it has."""

    what: str
    lacks: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    tensors: dict[str, Location] = field(default_factory=dict)

    @property
    def size(self) -> str:
        dtypes = Counter(at.dtype.safetensors for at in self.tensors.values())
        numbers = sum(prod(at.shape) for at in self.tensors.values())
        return f"{len(self.tensors)} of {numbers:,} numbers, {' and '.join(sorted(dtypes))}"


def recognise(place: Path) -> Form:
    """Raises FileNotFoundError and CheckpointError for what is no weights, or not whole as what it is."""
    if place.is_dir() and any((place / name).is_file() for name in (CONFIG, FILE)):
        return _adapter(place)
    if other := _other_format(place):
        return Form(f"{other.name}: {OTHER_FORMATS[other.suffix.lower()]}", [INSTEAD])
    for path in _headers(place):
        tensors = locate_weights(path, CheckpointError)
        what, name = other_layout(tensors) or ("", "")
        if ".lora_" in name:
            return _adapter(path)
        if what:
            return Form(f"{path.name}: {what} ({name:.200})", [INSTEAD], tensors=tensors)
    found = collect(place)
    tensors = beside(place).tensors | found.tensors
    lacks = [part for part, pattern in PARTS.items() if not any(re.match(pattern, name) for name in tensors)]
    if len(lacks) == len(PARTS):
        raise CheckpointError(f"{place} has no tensors of BAGEL; it begins with {next(iter(tensors), 'nothing'):.200}")
    if lacks := [*lacks, *_files_that_lack(place, found.given)]:
        return Form(_what(place, found), lacks, ["--checkpoint", BASE, "--weights", str(place)], found.tensors)
    return Form(_what(place, found), [], ["--checkpoint", str(place)], found.tensors)


def _other_format(place: Path) -> Path | None:
    """A file that is no safetensors; in a folder, if there are no other weights."""
    if place.is_dir() and (veomni.modules(place) or any(place.glob("*.safetensors"))):
        return None
    paths = [place] if place.is_file() else sorted(place.glob("*"))
    return next((path for path in paths if path.suffix.lower() in OTHER_FORMATS), None)


def _headers(place: Path) -> Iterable[Path]:
    folders = veomni.modules(place) or [place]
    return [path for folder in folders for path in transformer_files(folder)[0] if path.is_file()]


def _what(place: Path, found: Weights) -> str:
    if modules := veomni.modules(place):
        return f"BAGEL as VeOmni has it, {len(modules)} of its five folders"
    if found.comfyui:
        return (
            f"BAGEL as one file for ComfyUI, {next(iter(found.comfyui.values())).get('variant') or 'of no name'!s:.100}"
        )
    if groups := {id(part.group) for part in found.places.values() if isinstance(part, Part)}:
        return f"BAGEL in {len(groups)} groups of DFloat11"
    kinds = {at.dtype.name for name, at in found.tensors.items() if not name.startswith("vae.")}
    if not kinds:
        return "BAGEL's VAE"
    return "BAGEL in FP8 without scales" if kinds == {"float8_e4m3fn"} else "BAGEL"


def _files_that_lack(place: Path, given: Iterable[str]) -> list[str]:
    """Of a tokenizer and of the sizes."""
    folder = place.parent if place.is_file() else place
    there = {path.name for path in folder.glob("*")} | set(given)
    words = {path.name for path in (folder / veomni.TEXT).glob("*")} if veomni.modules(place) else there
    lacks = []
    if "tokenizer.json" not in words and not {"vocab.json", "merges.txt"} <= words:
        lacks.append("a tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    top = read_json(folder / "config.json", CheckpointError) if (folder / "config.json").is_file() else {}
    for name in ("llm_config", "vit_config"):
        if f"{name}.json" not in there and not (isinstance(top, dict) and isinstance(top.get(name), dict)):
            lacks.append(f"its sizes ({name}.json)")
    return lacks


def _adapter(place: Path) -> Form:
    path = place if place.is_file() else place / FILE
    config = path.parent / CONFIG
    said = read_json(config, CheckpointError) if config.is_file() else {}
    kind = {name: said.get(name) for name in ("peft_type", "r", "lora_alpha")} if isinstance(said, dict) else {}
    rank = f", rank {kind['r']!r:.20}, alpha {kind['lora_alpha']!r:.20}" if kind.get("r") else ""
    lacks = [f"{file.name}, beside it" for file in (config, path) if not file.is_file()]
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    lacks.append(f"the model that it changes{f', {base!r:.200}' if base else ''}")
    tensors = locate_weights(path, CheckpointError) if path.is_file() else {}
    what = f"an adapter of peft, {kind.get('peft_type') or 'LoRA'!s:.20}{rank}"
    return Form(what, lacks, ["--checkpoint", BASE, "--lora", str(place)], tensors)
