"""Which adapters go over a model, as users say it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Place = str | Path
Loras = Place | Sequence[Place | tuple[Place, float]]
Named = Mapping[str, Place | tuple[Place, float]]  # kept apart from the weights
MOST = 64  # adapters of a model


def with_factors(lora: Loras) -> list[tuple[str | Path, float]]:
    """Each adapter with the factor of its delta. Raises ValueError."""
    each = [lora] if isinstance(lora, str | Path) else lora
    allowed = "a file or a folder, or a list of these and of (file, factor)"
    if not isinstance(each, list | tuple):
        raise ValueError(f"lora is {lora!r:.200}; allowed: {allowed}")
    return [_with_factor(given, "lora has", allowed) for given in each]


def named(adapters: Named) -> dict[str, tuple[str | Path, float]]:
    """Each adapter's place and factor by its name. Raises ValueError."""
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) and name for name in adapters):
        raise ValueError(f"adapters is {adapters!r:.200}; allowed: an object from names to files or folders")
    if len(adapters) > MOST:
        raise ValueError(f"adapters has {len(adapters)}; allowed: at most {MOST} at a time")
    allowed = "a file or a folder, or (file, factor)"
    return {name: _with_factor(given, f"adapters has for {name!r:.60}", allowed) for name, given in adapters.items()}


def _with_factor(given: object, whose: str, allowed: str) -> tuple[str | Path, float]:
    place, factor = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
    if not isinstance(place, str | Path) or isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ValueError(f"{whose} {given!r:.200}; allowed: {allowed}")
    if not -100 <= factor <= 100:
        raise ValueError(f"{whose} {place} with the factor {factor!r}; allowed: a number from -100 to 100")
    return place, float(factor)
