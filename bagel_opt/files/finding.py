"""Where a checkpoint's files are: its folder, and in it the weights. Where a bundle's folder is."""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bagel_opt.errors import CheckpointError, reason
from bagel_opt.files.manifest import MANIFEST, read_manifest
from bagel_opt.files.manifest import WEIGHTS as BUNDLE_WEIGHTS
from bagel_opt.json_files import read_json
from bagel_opt.quantization import kinds_of_parts

FILES = ("*.json", "merges.txt", "*.safetensors", "example.png")  # the last: of examples.json
VAE_FILE = "ae.safetensors"  # names its tensors without a prefix; here they have "vae."
INDEX = "model.safetensors.index.json"
# The transformer's file, in the order in which one is taken: the official code reads the first, training with it writes the
# first two, and RecA, Bagel-Zebra-CoT and those who cast it to eight bits publish the others.
WEIGHTS = (
    "ema.safetensors",
    "model.safetensors",
    "model_bf16.safetensors",
    "ema-FP8.safetensors",
    "ema-fp8.safetensors",
)
QUANT_METHOD = "bagel_opt"  # of a quantization_config, as Hugging Face's libraries name theirs
SCALE = ".weight_scale"  # in the place of ".weight", of which it goes with the codes
# Other formats by their files' names, and what to take instead.
PICKLED = "pickled by PyTorch, and may run code when it is read"
OTHER_FORMATS = {".gguf": "GGUF", **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), PICKLED)}
# Other layouts of safetensors by the names of their tensors.
OTHER_LAYOUTS = {
    r"\.(qweight|qzeros|g_idx)$": "integers of GPTQ, AWQ or AutoRound",
    r"\.(absmax|quant_map|nested_absmax)$|\.quant_state\.bitsandbytes": "numbers of bitsandbytes",
    r"(\.|^)(scale_weight|weight_scale|weight_scale_inv|input_scale|scaled_fp8)$": "FP8 with scales",
    r"\.lora_[AB](\.|$)|\.lora_magnitude_vector": "a LoRA adapter, which goes over a model as lora=, --lora",
}


def transformer_files(place: Path) -> tuple[list[Path], list[Path]]:
    """The safetensors files of a transformer in a folder, or the one that is named, and those that could have been taken
    instead. Raises FileNotFoundError and CheckpointError."""
    if place.is_file():
        _check_format(place)
        return [place], []
    if (place / MANIFEST).is_file():
        raise CheckpointError(
            f"{place} is a bundle, whose weights are for its programs; give the checkpoint that it was made from"
        )
    if dfloat11_config(place) is not None:  # its package reads all files that are there
        return sorted(path for path in place.glob("*.safetensors") if path.name != VAE_FILE), []
    index = place / INDEX
    found = [path for name in WEIGHTS if (path := place / name).is_file()]
    shards = _shards(index) if index.is_file() else []
    # The official code reads ema.safetensors; an index beside it may be stale or tell of other weights.
    if shards and (not found or (found[0] in shards and all(path.is_file() for path in shards))):
        found = [path for path in found if path not in shards]
        return shards, found
    if found:
        return found[:1], found[1:]
    others = sorted(path for path in place.glob("*.safetensors") if path.name != VAE_FILE)
    if place / BUNDLE_WEIGHTS in others:
        raise CheckpointError(f"{place} has a bundle's weights, but no {MANIFEST}; copy or export the bundle again")
    if len(others) == 1 and others[0].name != "adapter_model.safetensors":
        return others, []
    if others:
        names = ", ".join(path.name for path in others[:8])
        raise FileNotFoundError(f"{place} has none of {', '.join(WEIGHTS)}; name the file to take as weights: {names}")
    for path in sorted(place.glob("*")):
        _check_format(path)
    raise FileNotFoundError(f"{place} has no weights: {', '.join(WEIGHTS)} or an index of shards")


def dfloat11_config(folder: Path) -> Any:
    """What config.json says of DFloat11 groups, or None. Raises CheckpointError."""
    return _in_config(folder, "dfloat11_config")


def quantized_parts(folder: Path) -> dict[str, str]:
    """The kinds of the parts (quantization.PARTS) that are in 8 bits, as config.json says it where `bagel-opt quantize` wrote
    it; others' schemes show by their tensors' names. Raises CheckpointError."""
    said = _in_config(folder, "quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != QUANT_METHOD:
        return {}
    match said:
        case {"version": 1, "parts": dict(parts)} if parts:
            with contextlib.suppress(ValueError):
                return kinds_of_parts(parts)
    raise CheckpointError(
        f"{folder / 'config.json'} has {said!r:.300} as quantization_config, which this bagel_opt does not know; upgrade it, "
        "or quantise the model again"
    )


def quantization_config(kinds: Mapping[str, str]) -> dict[str, Any]:
    """What `quantized_parts` reads."""
    return {"quant_method": QUANT_METHOD, "version": 1, "parts": dict(kinds)}


def _in_config(folder: Path, field: str) -> Any:
    path = folder / "config.json"
    data = read_json(path, CheckpointError) if path.is_file() else None
    return data.get(field) if isinstance(data, dict) else None


def _check_format(path: Path) -> None:
    if found := OTHER_FORMATS.get(path.suffix.lower()):
        raise CheckpointError(f"{path} is {found}; take the same weights as *.safetensors, in 16 bits or plain FP8")


def other_layout(names: Iterable[str], scales: bool = False) -> tuple[str, str] | None:
    """Which layout of tensors it is that is not BAGEL's, in words, and the name that shows it. scales: whether there are to
    be our own."""
    for name in names:
        if scales and name.endswith(SCALE):
            continue
        for pattern, what in OTHER_LAYOUTS.items():
            if re.search(pattern, name):
                return what, name
    return None


def check_layout(path: Path, names: Iterable[str], scales: bool = False) -> None:
    """Raises CheckpointError for tensors of another layout than BAGEL's, naming it. scales: as for `other_layout`."""
    if found := other_layout(names, scales):
        what, name = found
        raise CheckpointError(
            f"{path} holds {what} ({name:.200}); bagel_opt takes the same weights in 16 bits, or in FP8 without scales"
        )


def _shards(index: Path) -> list[Path]:
    try:
        shards = sorted(set(read_json(index, CheckpointError)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a valid index of shards") from None
    if any(not isinstance(name, str) or Path(name).name != name or not name.isprintable() for name in shards):
        raise CheckpointError(f"{index} names files outside its folder")
    return [index.parent / name for name in shards if name != VAE_FILE]


MODEL = "a checkpoint folder, a bundle or a repo id such as ByteDance-Seed/BAGEL-7B-MoT"


def find_place(source: str | Path, allowed: str = MODEL) -> Path:
    """A local folder or file as it is, or a Hugging Face repo id downloaded to the cache: of a bundle the files that its
    manifest names, else FILES. allowed: what an error says may be given. Raises FileNotFoundError, and BundleError for a
    repo's manifest that cannot be read."""
    if place := _local(source, allowed):
        return place
    first = _download(source, ["*.json"])
    if not (first / MANIFEST).is_file():
        return _download(source, FILES, revision=first.name)
    return _download(source, [MANIFEST, *map(glob.escape, read_manifest(first).files)], revision=first.name)


def find_file(source: str | Path, name: str, allowed: str) -> Path:
    """A local file as it is, or one of that name in a local folder or in a Hugging Face repo. Raises FileNotFoundError."""
    place = _local(source, allowed) or _download(source, [name])
    path = place if place.is_file() else place / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give {allowed}")
    return path


def find_bundle(source: str | Path) -> Path | None:
    """The folder of a bundle, a local one or a repo id's, of which only JSON files are downloaded; None for what is none.
    Raises FileNotFoundError where there is no such place, or a repo cannot be reached."""
    place = _local(source, MODEL) or _download(source, ["*.json"])
    return place if (place / MANIFEST).is_file() else None


def _local(source: str | Path, allowed: str) -> Path | None:
    """What is here by that name; None where it is not, and may be a repo's id. Raises FileNotFoundError, and TypeError for what is
    no name."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{source!r:.80} is {type(source).__name__}; give {allowed}")
    if not str(source):
        raise FileNotFoundError(f"'' names nothing; give {allowed}")
    with contextlib.suppress(OSError):  # of a name that is too long
        if Path(source).exists():
            return Path(source)
    if not _is_repo(source):
        raise FileNotFoundError(f"{str(source)[:200]} is no folder and no file; give {allowed}")
    return None


def _is_repo(source: str | Path) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)))


def _download(source: str | Path, patterns: Iterable[str], revision: str | None = None) -> Path:
    """What is of a repo in the cache, after its files of these patterns were downloaded. Raises FileNotFoundError."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{source} is no folder here, and to download a repo of that name takes: pip install huggingface-hub"
        ) from None
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a repo that can be downloaded: {reason(error)}"
        ) from None
