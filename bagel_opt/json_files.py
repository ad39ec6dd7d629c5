"""JSON files: read in one way, and refused in one line."""

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: Path, error: type[ValueError]) -> Any:
    """What a JSON file holds. Raises what `parse_json` raises, and OSError."""
    return parse_json(path.read_bytes(), path, error)


def parse_json(data: bytes, where: Path | str, error: type[ValueError]) -> Any:
    """What JSON holds. Raises `error`, naming where it is from, for what is none, and for what other readers might take
    otherwise: NaN, infinite numbers, a name twice."""
    try:
        return json.loads(
            data.decode("utf-8"), parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_named_once
        )
    except RecursionError:
        what = "it is nested too deeply"
    except ValueError as bad:
        what = str(bad)
    raise error(f"{where} is not valid JSON: {what}; copy or download it again")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.60} is too large a number")
    return number


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.200} is there twice")
        found[name] = value
    return found
