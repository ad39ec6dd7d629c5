"""What numbers of settings may be: each field of a dataclass says it, wherever the settings came from."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`: whole ones, or all, none of them infinite or NaN."""

    least: float
    most: float
    whole: bool = True

    def __contains__(self, value: object) -> bool:
        kinds = int if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.least} to {self.most}"


def whole(least: int, most: int, default: Any = MISSING) -> Any:
    """A field of a dataclass: a whole number."""
    return dataclasses.field(default=default, metadata={"range": Range(least, most)})


def real(least: float, most: float, default: Any = MISSING) -> Any:
    """A field of a dataclass: a number."""
    return dataclasses.field(default=default, metadata={"range": Range(least, most, whole=False)})


def check_numbers(settings: Any) -> None:
    """Raises ValueError naming the first field whose number is not allowed, and what is."""
    for field in dataclasses.fields(settings):
        if allowed := field.metadata.get("range"):
            check_number(field.name, getattr(settings, field.name), allowed)


def check_number(name: str, value: object, allowed: Range) -> None:
    """Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r:.60}; it must be {allowed}")
