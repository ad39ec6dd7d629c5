"""What a user asks for: inputs and options, checked before anything runs."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bagel_opt.errors import UnknownOptionError
from bagel_opt.images import check_image

RENORM_TYPES = ("global", "channel", "text_channel")
STEP_CACHES = ("taylorseer", "teacache")


@dataclass(frozen=True)
class StepEvent:
    """What `on_step` receives after each flow step: x_t before the step and the guided velocity v_t that it took,
    float32 [tokens, 64] on the host (torch tensors; NumPy arrays where torch is not installed)."""

    index: int
    total: int
    t: float
    x_t: Any
    v_t: Any


def check_text(text: str, where: str) -> None:
    """Raises ValueError for text with half of a surrogate pair, such as bytes that were not UTF-8 on a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds characters that are no valid Unicode; give it as UTF-8") from None


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options in the official names. Values out of range raise ValueError.

    noise: the initial latent tokens [tokens, 64]; vae_noise: the posterior noise [1, 16, H / 8, W / 8] of the input
    image, or a list of one per image. Either overrides what `seed` would draw.
    """

    output: str = "image"
    think: bool = False
    max_think_tokens: int | None = None  # None: 1000, or what a fixed profile has room for
    do_sample: bool = False
    text_temperature: float = 0.3
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: str = "global"
    timestep_shift: float = 3.0
    num_timesteps: int = 50
    height: int | None = None  # None: the model's own, 1024 for the published one
    width: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    step_cache: str | None = None
    noise: Any = None
    vae_noise: Any = None
    on_step: Callable[[StepEvent], Any] | None = None
    on_token: Callable[[int], Any] | None = None

    def __post_init__(self):
        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {allowed}")

        def number(value: object) -> bool:
            return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value

        def whole(value: object, low: int) -> bool:
            return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= low

        check("output", self.output in ("image", "text"), "'image' or 'text'")
        for name in ("think", "do_sample"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        longest = self.max_think_tokens
        check("max_think_tokens", longest is None or whole(longest, 1), "a whole number of at least 1")
        check("num_timesteps", whole(self.num_timesteps, 2), "a whole number of at least 2")
        warm = self.text_temperature
        check("text_temperature", number(warm) and 1e-3 <= warm <= 1000, "a number from 0.001 to 1000")
        for name in ("cfg_text_scale", "cfg_img_scale"):
            value = getattr(self, name)
            check(name, number(value) and 0 <= value <= 1000, "a number from 0 to 1000; up to 1 is no guidance")
        low_high = self.cfg_interval
        pair = isinstance(low_high, Sequence) and len(low_high) == 2 and all(number(bound) for bound in low_high)
        check("cfg_interval", pair and 0 <= low_high[0] <= low_high[1] <= 1, "(low, high) with 0 <= low <= high <= 1")
        check("cfg_renorm_min", number(self.cfg_renorm_min) and 0 <= self.cfg_renorm_min <= 1, "a number from 0 to 1")
        check("cfg_renorm_type", self.cfg_renorm_type in RENORM_TYPES, ", ".join(map(repr, RENORM_TYPES)))
        shift = self.timestep_shift
        check("timestep_shift", number(shift) and 1e-3 <= shift <= 1000, "a number from 0.001 to 1000")
        for name in ("height", "width"):
            value = getattr(self, name)
            check(name, value is None or whole(value, 1), "a whole number of pixels")
        for name in ("max_think_tokens", "num_timesteps", "height", "width", "seed"):
            if isinstance(getattr(self, name), numbers.Integral) and not isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's integers would overflow
        check(
            "seed",
            self.seed is None or (whole(self.seed, 0) and self.seed < 2**63),
            "None or a number from 0 to 2**63 - 1",
        )
        check("negative_prompt", isinstance(self.negative_prompt, str | None), "None or a text")
        check_text(self.negative_prompt or "", "negative_prompt")
        check("step_cache", self.step_cache in (None, *STEP_CACHES), f"None, {', '.join(map(repr, STEP_CACHES))}")
        for name in ("on_step", "on_token"):
            check(name, getattr(self, name) is None or callable(getattr(self, name)), "None or a function")

    @property
    def counts_evaluations(self) -> bool:
        """Whether the step cache counts each guidance branch's evaluations by itself."""
        return self.step_cache == "taylorseer"

    @classmethod
    def make(cls, options: dict) -> "Options":
        """Raises UnknownOptionError, a TypeError and a ValueError, for a name that is no option."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise UnknownOptionError(f"unknown option {', '.join(map(repr, unknown))}; there are: {', '.join(known)}")
        return cls(**options)


class Request:
    """Texts and PIL images in order, with options.

    Raises ValueError for bad options, an empty list and too thin an image, TypeError for other inputs.
    """

    def __init__(self, inputs: "str | Image.Image | Sequence[str | Image.Image]", **options: Any):
        if not isinstance(inputs, str | Image.Image | Iterable):
            raise TypeError(f"inputs is {type(inputs).__name__}; allowed are str, PIL.Image.Image and lists of them")
        self.inputs = [inputs] if isinstance(inputs, str | Image.Image) else list(inputs)
        if not self.inputs:
            raise ValueError("inputs is empty; give at least one text or PIL image")
        for index, item in enumerate(self.inputs):
            if isinstance(item, Image.Image):
                check_image(item, f"inputs[{index}]")
            elif not isinstance(item, str):
                raise TypeError(f"inputs[{index}] is {type(item).__name__}; allowed are str and PIL.Image.Image")
            else:
                check_text(item, f"inputs[{index}]")
        self.options = Options.make(options)
