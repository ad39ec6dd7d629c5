"""BAGEL as one file for ComfyUI: the published names, and what the JSON files say in the header
(github.com/neverbiasu/ComfyUI-BAGEL, modeling/bagel/converted_format.py and model_loader.py)."""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from bagel_opt.config import SpecialTokens
from bagel_opt.errors import CheckpointError
from bagel_opt.json_files import parse_json, read_json
from bagel_opt.tokenizer import SPECIAL

KEY, VERSION = "comfyui_bagel", 1
SIDECAR = ".comfyui-bagel.json"  # after the file's name: the same, where the header could not be written anew


def read_notes(path: Path, notes: Mapping[str, str]) -> dict[str, Any] | None:
    """What a file says of its model, from its header's notes or the file beside it; None where it is no file for ComfyUI.

    "model_configs" are JSON files by name. Raises CheckpointError.
    """
    beside = path.with_name(path.name + SIDECAR)
    if KEY in notes:
        where, data = f"{KEY} in the header of {path}", notes[KEY]
        found = parse_json(data.encode(), where, CheckpointError)
    elif beside.is_file():
        where, found = f"{beside}", read_json(beside, CheckpointError)
        found = found.get("metadata") if isinstance(found, dict) else None
    else:
        return None
    match found:
        case {"format": "comfyui_bagel", "format_version": 1, "model_configs": dict(configs)}:
            if all(isinstance(config, dict) for config in configs.values()):
                return found
    raise CheckpointError(
        f"{where} is not of format {KEY!r}, version {VERSION}, with objects in model_configs; convert the model again"
    )


def check_tokenizer(path: Path, notes: Mapping[str, Any], special: SpecialTokens) -> None:
    """Raises CheckpointError where the file is for a tokenizer with other special tokens."""
    want = notes.get("special_token_ids")
    for token, number in zip(SPECIAL, astuple(special), strict=True):
        if isinstance(want, dict) and want.get(token, number) != number:
            raise CheckpointError(
                f"{path} is for a tokenizer in which {token} is {want[token]!r:.60}, and here it is {number}; give the tokenizer "
                "of the model that it was made from"
            )
