"""A request's options, written down once: names, defaults, ranges and help.

Python's arguments are checked here; the command line, the server's bodies and the page are made from `described`.
"""
# ruff: noqa: RUF009  option makes fields

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bagel_opt.errors import UnknownOptionError
from bagel_opt.option_kinds import (
    ADAPTERS,
    EVERY,
    INPUTS,
    INTERLEAVING,
    PICTURE,
    READING,
    SIZE,
    VIDEO,
    Choice,
    Flag,
    Function,
    Interval,
    Number,
    Option,
    Scales,
    Text,
    Texts,
    check_text,
    option,
)

RENORM_TYPES = ("global", "channel", "text_channel")
OUTPUTS = ("image", "text", "video", "interleaved")
INTERLEAVED_CONTEXTS = ("rebuilt", "main")
STEP_CACHES = ("taylorseer", "teacache")
DEFAULT_TOKENS = 1000  # of a thought or an answer
DEFAULT_FRAMES, FPS = 49, 12  # of a video, as in the code of Lance
DEFAULT_ROUNDS = 3  # of texts and pictures, as in ThinkMorph's code
OWN_SIZE = "the last input picture's, as it is read; without one the model's own, up to 1024"


SCALE = Number(0, 1000, wording="a number from 0 to 1000; up to 1 is no guidance")
PIXELS = Number(1, whole=True, wording="a whole number of pixels")
RESOLUTION = Number(16, 4096, whole=True)
SIDE = Number(1, 2**16, whole=True, wording=f"a whole number of pixels, at most {2**16}")


@dataclass(frozen=True)
class StepEvent:
    """What `on_step` receives after each flow step: x_t before the step and the guided velocity v_t that it took,
    float32 [tokens, 64] on the host (torch tensors; NumPy arrays where torch is not installed). round: of an interleaved
    request."""

    index: int
    total: int
    t: float
    x_t: Any
    v_t: Any
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options in the official names. Values out of range raise ValueError.

    noise: the initial latent tokens [tokens, 64]; vae_noise: the posterior noise [1, 16, H / 8, W / 8] of the input
    image, or a list of one per image. Either overrides what `seed` would draw.
    """

    output: str = option("image", Choice(OUTPUTS, "'image', 'text', 'video' or 'interleaved'"))
    think: bool = option(False, Flag(), EVERY, "think before drawing or answering")
    max_think_tokens: int | None = option(
        None,  # or what a fixed profile has room for
        Number(1, whole=True),
        EVERY,
        "the longest thought or answer, in tokens",
        unset=str(DEFAULT_TOKENS),
    )
    do_sample: bool = option(False, Flag(), EVERY, "sample the text instead of taking the likeliest token")
    text_temperature: float = option(0.3, Number(0.001, 1000), EVERY, "temperature of sampling")
    top_p: float = option(
        1.0,
        Number(0, 1),
        EVERY,
        "sample from the likeliest tokens alone that have together this share of the probability",
    )
    stop: str | Sequence[str] | None = option(
        None,
        Texts(4, 256),
        EVERY,
        "a text before which writing ends, or up to four such; interleaved, the text that holds one is the last",
        unset="none",
    )
    system_prompt: str | None = option(None, Text(), EVERY, "a text that is read before all else", unset="none")
    think_prompt: str | None = option(
        None, Text(), EVERY, "what is read first in order to think", unset="what BAGEL was trained with"
    )
    seed: int | None = option(
        None,
        Number(0, 2**63 - 1, whole=True, wording="None or a number from 0 to 2**63 - 1"),
        EVERY,
        "the same seed gives the same picture or text, up to rounding",
        unset="random",
    )
    height: int | None = option(None, PIXELS, SIZE, "in pixels, a multiple of 16", unset=OWN_SIZE)
    width: int | None = option(None, PIXELS, SIZE, "in pixels, a multiple of 16", unset=OWN_SIZE)
    size: str | None = option(
        None,
        Choice(("input",), "None or 'input'"),
        SIZE,
        "input: the picture that was drawn is resized to the size that the last input picture came in",
        unset="as drawn",
    )
    num_timesteps: int = option(
        50, Number(2, whole=True), PICTURE, "points of the flow schedule: more take longer and refine the picture"
    )
    timestep_shift: float = option(
        3.0, Number(0.001, 1000), PICTURE, "above 1, more steps go to high noise, where the layout is made"
    )
    cfg_text_scale: float = option(4.0, SCALE, PICTURE, "how strongly the picture follows the text; up to 1 is off")
    cfg_img_scale: float = option(1.5, SCALE, INPUTS, "how strongly it keeps to the input pictures; up to 1 is off")
    cfg_interval: tuple[float, float] = option(
        (0.4, 1.0),
        Interval(0, 1),
        PICTURE,
        "the flow times t with guidance, low < t <= high; 1 is noise, 0 the picture",
    )
    cfg_renorm_type: str = option(
        "global",
        Choice(RENORM_TYPES),
        PICTURE,
        "over what the guided velocity is scaled back; blurry edits may gain from text_channel",
    )
    cfg_renorm_min: float = option(
        0.0,
        Number(0, 1),
        PICTURE,
        "the least factor by which the guided velocity may be scaled back; 1 switches it off",
    )
    negative_prompt: str | None = option(None, Text(), PICTURE, "what the picture should not follow", unset="nothing")
    step_cache: str | None = option(
        None,
        Choice(STEP_CACHES, f"None, {', '.join(map(repr, STEP_CACHES))}"),
        PICTURE,
        "fewer evaluations for nearly the same picture: taylorseer predicts most steps, teacache skips those that would "
        "change little",
        unset="none",
    )
    vit_min_size: int | None = option(
        None, SIDE, READING, "the least side to which pictures are enlarged for the ViT", unset="the model's"
    )
    vit_max_size: int | None = option(
        None, SIDE, READING, "the longest side to which pictures are reduced for the ViT", unset="the model's"
    )
    vae_min_size: int | None = option(
        None, SIDE, READING, "the least side to which pictures are enlarged for the VAE", unset="the model's"
    )
    vae_max_size: int | None = option(
        None, SIDE, READING, "the longest side to which pictures are reduced for the VAE", unset="the model's"
    )
    num_frames: int | None = option(
        None,
        Number(1, whole=True),
        VIDEO,
        "frames of the video to draw: 4 n + 1 of them, else as many fewer",
        unset=str(DEFAULT_FRAMES),
    )
    fps: float | None = option(
        None,
        Number(1, 240),
        VIDEO,
        "frames a second: of a video that is given as frames, and of the file that one is written to",
        unset=f"the file's own, or {FPS}",
    )
    resolution_vae: int | None = option(
        None,
        RESOLUTION,
        VIDEO,
        "pictures and videos are read by the VAE as about so many pixels times as many",
        unset="768, of a video 640",
    )
    resolution_vit: int | None = option(
        None,
        RESOLUTION,
        VIDEO,
        "pictures and videos are read by the ViT as about so many pixels times as many",
        unset="672, of a video 616",
    )
    interleaved_context: str = option(
        "rebuilt",
        Choice(INTERLEAVED_CONTEXTS),
        INTERLEAVING,
        "what rounds read: rebuilt from all that was written and drawn, for guidance too, as in Bagel-Zebra-CoT, or main, "
        "which alone grows, as in ThinkMorph",
    )
    max_rounds: int | None = option(
        None,  # or what a fixed profile has room for
        Number(1, 100, whole=True),
        INTERLEAVING,
        "the most rounds of a text and a picture",
        unset=str(DEFAULT_ROUNDS),
    )
    draw_marker: str | None = option(
        None,
        Text(),
        INTERLEAVING,
        "what a text must hold for a picture to be drawn after it",
        unset="nothing, or <image_start> where main alone grows",
    )
    adapters: Mapping[str, float] | None = option(
        None,
        Scales(-100, 100),
        ADAPTERS,
        "how much of each adapter counts that the model keeps apart; those not named do not",
        unset="as the adapters were set",
    )
    noise: Any = option(None, None)
    vae_noise: Any = option(None, None)
    on_step: Callable[[StepEvent], Any] | None = option(None, Function())
    on_token: Callable[[int], Any] | None = option(None, Function())
    on_output: Callable[[Any], Any] | None = option(None, Function())

    def __post_init__(self):
        for name, one in described().items():
            value, kind = getattr(self, name), one.kind
            if kind is None or (value is None and one.default is None):
                continue
            if not kind.allows(value):
                raise ValueError(f"{name}={value!r}; allowed: {kind.allowed}")
            if isinstance(kind, Number) and kind.whole:
                object.__setattr__(self, name, int(value))  # NumPy's integers would overflow
            if isinstance(kind, Texts):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
            if isinstance(kind, Text | Texts):
                for text in (value,) if isinstance(value, str) else value:
                    check_text(text, name)
        if self.output == "interleaved":
            for name in ("noise", "vae_noise"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is given; of an interleaved request the seed alone says what noise is drawn"
                    )
            if self.size is not None:
                raise ValueError(f"size={self.size!r}; an interleaved request's pictures are as they are drawn")

    @property
    def counts_evaluations(self) -> bool:
        """Whether the step cache counts each guidance branch's evaluations by itself."""
        return self.step_cache == "taylorseer"

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which writing ends."""
        return self.stop or ()

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
    return {one.name: one for one in options if not groups or one.group in groups}


def check_recommended(table: object) -> None:
    """Raises ValueError for what is no table of options that a model may recommend: all that JSON can hold but `seed` and
    `think`, which are the user's."""
    if not isinstance(table, Mapping):
        raise ValueError(f"holds {type(table).__name__}, not an object of options")
    known = described(EVERY, PICTURE, SIZE, INPUTS, READING, INTERLEAVING).keys() - {"seed", "think"}
    if unknown := [name for name in table if name not in known]:
        raise ValueError(
            f"{', '.join(f'{name!r:.60}' for name in unknown[:8])} is no option to recommend; there are: {', '.join(sorted(known))}"
        )
    Options(**table)
