"""What options are made of: kinds of their values, what they are for, and their words. `allows` leaves out None, which is allowed where it is the default."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What an option is for. Those of size and inputs are a picture's too: its size, and how it keeps to the input pictures. Those of reading are how pictures go in, whatever comes out; those of interleaving are for
# texts and pictures in turn; those of video are for models that draw videos.
EVERY, PICTURE, SIZE, INPUTS, READING, INTERLEAVING = "every", "picture", "size", "inputs", "reading", "interleaving"
ADAPTERS, VIDEO = "adapters", "video"


@dataclass(frozen=True)
class Number:
    """A number from low to high, whole or not; high None: as large as may be. wording: what an error says is allowed."""

    low: float
    high: float | None = None
    whole: bool = False
    wording: str = ""

    def allows(self, value: object) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        right = isinstance(value, kind) and not isinstance(value, bool)
        return right and self.low <= value and (self.high is None or value <= self.high)  # NaN is in no range

    @property
    def allowed(self) -> str:
        a_number = f"a{' whole' * self.whole} number"
        reach = f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"
        return self.wording or f"{a_number} {reach}"


@dataclass(frozen=True)
class Interval:
    """Two numbers from low to high, in order."""

    low: float
    high: float

    def allows(self, value: object) -> bool:
        pair = isinstance(value, Sequence) and len(value) == 2
        return pair and all(map(Number(self.low, self.high).allows, value)) and value[0] <= value[1]

    @property
    def allowed(self) -> str:
        return f"(low, high) with {self.low} <= low <= high <= {self.high}"


@dataclass(frozen=True)
class Choice:
    """One of some names. wording: what an error says is allowed."""

    values: tuple[str, ...]
    wording: str = ""

    def allows(self, value: object) -> bool:
        return value in self.values

    @property
    def allowed(self) -> str:
        return self.wording or ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class Flag:
    allowed = "True or False"

    def allows(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text:
    allowed = "None or a text"

    def allows(self, value: object) -> bool:
        return isinstance(value, str)


@dataclass(frozen=True)
class Texts:
    """A text, or several: at most `most` of up to `longest` characters each."""

    most: int
    longest: int

    @property
    def allowed(self) -> str:
        return f"None, or up to {self.most} texts of 1 to {self.longest} characters"

    def allows(self, value: object) -> bool:
        texts = [value] if isinstance(value, str) else value
        several = isinstance(texts, list | tuple) and len(texts) <= self.most
        return several and all(isinstance(text, str) and 1 <= len(text) <= self.longest for text in texts)


@dataclass(frozen=True)
class Scales:
    """A number from low to high for each of some names."""

    low: float
    high: float

    @property
    def allowed(self) -> str:
        return f"None or an object from adapters' names to numbers from {self.low} to {self.high}"

    def allows(self, value: object) -> bool:
        number = Number(self.low, self.high).allows
        return isinstance(value, Mapping) and all(isinstance(n, str) and number(s) for n, s in value.items())


@dataclass(frozen=True)
class Function:
    allowed = "None or a function"

    def allows(self, value: object) -> bool:
        return callable(value)


Kind = Number | Interval | Choice | Flag | Text | Texts | Scales | Function


@dataclass(frozen=True)
class Option:
    """What is known of an option. group: EVERY, PICTURE, SIZE, INPUTS or ADAPTERS; None where Python alone has it. help: a phrase.
    unset: what None, as the default, stands for."""

    name: str
    default: Any
    kind: Kind | None
    group: str | None
    help: str
    unset: str

    @property
    def sentence(self) -> str:
        return f"{self.help[0].upper()}{self.help[1:]}."


def option(default: Any, kind: Any, group: str | None = None, help: str = "", unset: str = "") -> Any:
    return field(default=default, metadata={"kind": kind, "group": group, "help": help, "unset": unset})


def check_text(text: str, where: str) -> None:
    """Raises ValueError for text with half of a surrogate pair, such as bytes that were not UTF-8 on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds characters that are no valid Unicode; give it as UTF-8") from None
