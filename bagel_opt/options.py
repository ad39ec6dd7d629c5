"""A request's options, written down once: names, defaults, ranges and help.

Python's arguments are checked here; the command line, the server's bodies and the page are made from `described`.
"""
# ruff: noqa: RUF009  _option makes fields

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bagel_opt.errors import UnknownOptionError

RENORM_TYPES = ("global", "channel", "text_channel")
STEP_CACHES = ("taylorseer", "teacache")
DEFAULT_TOKENS = 1000  # of a thought or an answer
# What an option is for. Those of size and inputs are a picture's too: its size where no input picture gives it, and how
# it keeps to those that go in.
EVERY, PICTURE, SIZE, INPUTS, ADAPTERS = "every", "picture", "size", "inputs", "adapters"


# ---- kinds of values; `allows` leaves out None, which is allowed where it is the default


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


@dataclass(frozen=True)
class Option:
    """What is known of an option. group: EVERY, PICTURE, SIZE, INPUTS or ADAPTERS; None where Python alone has it. help: a phrase.
    unset: what None, as the default, stands for."""

    name: str
    default: Any
    kind: Number | Interval | Choice | Flag | Text | Scales | Function | None
    group: str | None
    help: str
    unset: str

    @property
    def sentence(self) -> str:
        return f"{self.help[0].upper()}{self.help[1:]}."


SCALE = Number(0, 1000, wording="a number from 0 to 1000; up to 1 is no guidance")
PIXELS = Number(1, whole=True, wording="a whole number of pixels")


def _option(default: Any, kind: Any, group: str | None = None, help: str = "", unset: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "group": group, "help": help, "unset": unset})


def check_text(text: str, where: str) -> None:
    """Raises ValueError for text with half of a surrogate pair, such as bytes that were not UTF-8 on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds characters that are no valid Unicode; give it as UTF-8") from None


@dataclass(frozen=True)
class StepEvent:
    """What `on_step` receives after each flow step: x_t before the step and the guided velocity v_t that it took,
    float32 [tokens, 64] on the host (torch tensors; NumPy arrays where torch is not installed)."""

    index: int
    total: int
    t: float
    x_t: Any
    v_t: Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options in the official names. Values out of range raise ValueError.

    noise: the initial latent tokens [tokens, 64]; vae_noise: the posterior noise [1, 16, H / 8, W / 8] of the input
    image, or a list of one per image. Either overrides what `seed` would draw.
    """

    output: str = _option("image", Choice(("image", "text"), "'image' or 'text'"))
    think: bool = _option(False, Flag(), EVERY, "think before drawing or answering")
    max_think_tokens: int | None = _option(
        None,  # or what a fixed profile has room for
        Number(1, whole=True),
        EVERY,
        "the longest thought or answer, in tokens",
        unset=str(DEFAULT_TOKENS),
    )
    do_sample: bool = _option(False, Flag(), EVERY, "sample the text instead of taking the likeliest token")
    text_temperature: float = _option(0.3, Number(0.001, 1000), EVERY, "temperature of sampling")
    seed: int | None = _option(
        None,
        Number(0, 2**63 - 1, whole=True, wording="None or a number from 0 to 2**63 - 1"),
        EVERY,
        "the same seed gives the same picture or text, up to rounding",
        unset="random",
    )
    height: int | None = _option(
        None,
        PIXELS,
        SIZE,
        "in pixels, a multiple of 16",
        unset="the model's own, up to 1024",
    )
    width: int | None = _option(
        None,
        PIXELS,
        SIZE,
        "in pixels, a multiple of 16",
        unset="the model's own, up to 1024",
    )
    num_timesteps: int = _option(
        50,
        Number(2, whole=True),
        PICTURE,
        "points of the flow schedule: more take longer and refine the picture",
    )
    timestep_shift: float = _option(
        3.0, Number(0.001, 1000), PICTURE, "above 1, more steps go to high noise, where the layout is made"
    )
    cfg_text_scale: float = _option(
        4.0,
        SCALE,
        PICTURE,
        "how strongly the picture follows the text; up to 1 is off",
    )
    cfg_img_scale: float = _option(
        1.5,
        SCALE,
        INPUTS,
        "how strongly it keeps to the input pictures; up to 1 is off",
    )
    cfg_interval: tuple[float, float] = _option(
        (0.4, 1.0),
        Interval(0, 1),
        PICTURE,
        "the flow times t with guidance, low < t <= high; 1 is noise, 0 the picture",
    )
    cfg_renorm_type: str = _option(
        "global",
        Choice(RENORM_TYPES),
        PICTURE,
        "over what the guided velocity is scaled back; blurry edits may gain from text_channel",
    )
    cfg_renorm_min: float = _option(
        0.0,
        Number(0, 1),
        PICTURE,
        "the least factor by which the guided velocity may be scaled back; 1 switches it off",
    )
    negative_prompt: str | None = _option(None, Text(), PICTURE, "what the picture should not follow", unset="nothing")
    step_cache: str | None = _option(
        None,
        Choice(STEP_CACHES, f"None, {', '.join(map(repr, STEP_CACHES))}"),
        PICTURE,
        "fewer evaluations for nearly the same picture: taylorseer predicts most steps, teacache skips those that would "
        "change little",
        unset="none",
    )
    adapters: Mapping[str, float] | None = _option(
        None,
        Scales(-100, 100),
        ADAPTERS,
        "how much of each adapter counts that the model keeps apart; those not named do not",
        unset="as the adapters were set",
    )
    noise: Any = _option(None, None)
    vae_noise: Any = _option(None, None)
    on_step: Callable[[StepEvent], Any] | None = _option(None, Function())
    on_token: Callable[[int], Any] | None = _option(None, Function())

    def __post_init__(self):
        for name, option in described().items():
            value, kind = getattr(self, name), option.kind
            if kind is None or (value is None and option.default is None):
                continue
            if not kind.allows(value):
                raise ValueError(f"{name}={value!r}; allowed: {kind.allowed}")
            if isinstance(kind, Number) and kind.whole:
                object.__setattr__(self, name, int(value))  # NumPy's integers would overflow
            if isinstance(kind, Text):
                check_text(value, name)

    @property
    def counts_evaluations(self) -> bool:
        """Whether the step cache counts each guidance branch's evaluations by itself."""
        return self.step_cache == "taylorseer"

    @classmethod
    def make(cls, options: dict) -> "Options":
        """Raises UnknownOptionError, a TypeError and a ValueError, for a name that is no option."""
        known = list(described())
        if unknown := [name for name in options if name not in known]:
            raise UnknownOptionError(f"unknown option {', '.join(map(repr, unknown))}; there are: {', '.join(known)}")
        return cls(**options)


def described(*groups: str) -> dict[str, Option]:
    """The options of these groups by name, or all of them, in the order in which they are written down."""
    fields = dataclasses.fields(Options)
    options = (Option(field.name, field.default, **field.metadata) for field in fields)
    return {option.name: option for option in options if not groups or option.group in groups}
