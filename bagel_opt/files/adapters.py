"""Which adapters go over a model, as users say it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Place = str | Path
Loras = Place | Sequence[Place | tuple[Place, float]]
Named = Mapping[str, Place | tuple[Place, float]]  # kept apart from the weights
MOST = 64  # adapters of a model


def with_factors(lora: Loras) -> list[tuple[str | Path, float]]:
    """Each adapter with the factor of its delta. Raises ValueError."""
    found = []
    for given in [lora] if isinstance(lora, str | Path) else lora:
        place, factor = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
        if not isinstance(place, str | Path) or isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ValueError(f"lora has {given!r:.200}; allowed: a file or a folder, or (file, factor)")
        if not -100 <= factor <= 100:
            raise ValueError(f"lora has the factor {factor!r} for {place}; allowed: a number from -100 to 100")
        found.append((place, float(factor)))
    return found


def named(adapters: Named) -> dict[str, tuple[str | Path, float]]:
    """Each adapter's place and factor by its name. Raises ValueError."""
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) and name for name in adapters):
        raise ValueError(f"adapters is {adapters!r:.200}; allowed: an object from names to files or folders")
    if len(adapters) > MOST:
        raise ValueError(f"adapters has {len(adapters)}; allowed: at most {MOST} at a time")
    return dict(zip(adapters, with_factors(list(adapters.values())), strict=True))
