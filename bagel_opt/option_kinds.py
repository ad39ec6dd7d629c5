"""Kinds of values that options have. `allows` leaves out None, which is allowed where it is the default."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
