"""A checked request: its contexts as blocks, and the room they need."""

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bagel_opt.errors import ProfileError
from bagel_opt.images import Canvas, InputImage
from bagel_opt.options import Options
from bagel_opt.profile import Profile
from bagel_opt.sampling.contexts import Block
from bagel_opt.sampling.flow import FlowStep

LEAST_TOKENS = 16  # a profile with less room for it is too small for the request


class AnyPlan(Protocol):
    """What engines and profiles ask of a plan: a `Plan`, or an `Interleaved` of many."""

    options: Options
    max_tokens: int
    resized: tuple[int, int] | None

    @property
    def canvas(self) -> Canvas | None: ...

    @property
    def draws(self) -> bool: ...

    @property
    def spare(self) -> int: ...

    def contexts(self) -> int: ...

    def tokens(self, kind: str) -> int: ...

    def latents(self) -> int: ...

    def peak(self, text: int, patches: int, latents: int) -> tuple[int, int]: ...

    def fitted(self, profile: Profile) -> "AnyPlan": ...


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request: the blocks of its contexts, its pictures, its flow steps and its noise.

    main, cfg_text, cfg_img: blocks of the three contexts, before any thought. A guidance context is None where the
    request never evaluates it.
    """

    options: Options
    main: list[Block]
    cfg_text: list[Block] | None
    cfg_img: list[Block] | None
    images: list[InputImage]
    steps: list[FlowStep] = field(default_factory=list)
    canvas: Canvas | None = None  # the picture to draw
    max_tokens: int = 0  # longest text to generate, the start token included
    noise: np.ndarray | None = None
    vae_noise: list[np.ndarray] = field(default_factory=list)
    resized: tuple[int, int] | None = None  # (height, width) that the picture is given once it is drawn, if another
    targets: tuple[Block, ...] = ()  # the picture as a block after main, cfg_text and cfg_img, where that is not DRAWN
    first_image: int | None = None  # the image that is the first frame of the video to draw
    after: int | None = None  # the token after which a text is written, where that is no block of its own

    @property
    def draws(self) -> bool:
        return self.options.output in ("image", "video")

    @property
    def clean(self) -> int:
        """The first latent tokens to draw, which are there already."""
        return 0 if self.first_image is None else self.images[self.first_image].canvas.tokens

    @property
    def writes(self) -> bool:
        return self.options.think or not self.draws

    @property
    def thinks(self) -> bool:
        """Whether a thought joins the main context before the picture is drawn."""
        return self.draws and self.options.think

    @property
    def spare(self) -> int:
        """Slots for a thought that is longer when it is read again."""
        return 2 * self.max_tokens if self.thinks else 0

    def roles(self) -> tuple[int, int, int]:
        """Which of the request's rows main, cfg_text and cfg_img have. Contexts of equal content share one.

        Not with main, however, where a thought will join it, nor where evaluations are counted and guidance starts late: a
        branch is then behind main in its count.
        """
        late = self.options.counts_evaluations and not (self.steps and self.steps[0].guided)
        rows: list[list[Block] | None] = [None if self.thinks or late else self.main]

        def row(blocks: list[Block] | None) -> int:
            if blocks is None:
                return 0
            if blocks not in rows:
                rows.append(blocks)
            return rows.index(blocks)

        return 0, row(self.cfg_text), row(self.cfg_img)

    def contexts(self) -> int:
        """Rows that the request occupies."""
        return 1 + max(self.roles())

    def tokens(self, kind: str) -> int:
        """The longest block of a kind, without markers for images."""
        blocks = [b for blocks in (self.main, self.cfg_text, self.cfg_img) for b in blocks or [] if b.kind == kind]
        return max((b.room for b in blocks), default=0)

    def latents(self) -> int:
        return max(self.tokens("vae"), self.canvas.tokens if self.canvas else 0)

    def peak(self, text: int, patches: int, latents: int) -> tuple[int, int]:
        """(slots that contexts fill at most, slots that the padded programs touch at most) for these chunk sizes.

        A thought is decoded and encoded again; it counts here with as many ids as were generated, which text
        keeps to. One that comes out longer than the room left is refused when it is there.
        """
        padded = {"text": text, "vit": patches + 2, "vae": latents + 2}
        filled = touched = 0
        for blocks in filter(None, (self.main, self.cfg_text, self.cfg_img)):
            length = 0
            for block in blocks:
                if block.kind == "text":
                    chunks = -(-block.length // text)
                    touched = max(touched, length + chunks * text)
                else:
                    touched = max(touched, length + padded[block.kind])
                length += block.length
            if blocks is self.main:
                if self.writes:
                    touched = max(touched, length + self.max_tokens)
                    if not self.draws:
                        length += self.max_tokens
                if self.thinks:
                    thought = self.max_tokens + 1
                    touched = max(touched, length + -(-thought // text) * text)
                    length += thought
            filled = max(filled, length)
            if self.draws:
                touched = max(touched, length + padded["vae"])
        return filled, max(filled, touched)

    def fitted(self, profile: Profile) -> "Plan":
        """The request as this profile runs it: where no longest text was asked for, with the longest that the profile has
        room for, down to LEAST_TOKENS. Raises ProfileError, naming the field, its value and the need, where it does not fit.
        """
        sizes, plan = (profile.text, profile.patches, profile.latents), self
        while (
            self.options.max_think_tokens is None
            and plan.max_tokens > LEAST_TOKENS
            and plan.peak(*sizes)[1] > profile.slots
        ):
            plan = dataclasses.replace(plan, max_tokens=plan.max_tokens - 1)
        if lacking := lack(plan, profile):
            raise ProfileError(lacking)
        return plan


def lack(plan: AnyPlan, profile: Profile, fewer: str = "fewer images") -> str | None:
    """What a profile lacks for a plan: the field, its value and the need. fewer: of what there might be."""
    needs = {
        "patches": (plan.tokens("vit"), "a smaller input image"),
        "latents": (plan.latents(), "a smaller height and width, or a smaller input image"),
        "slots": (
            plan.peak(profile.text, profile.patches, profile.latents)[1],
            f"a smaller size, shorter text or {fewer}",
        ),
    }
    for name, (need, smaller) in needs.items():
        if need > getattr(profile, name):
            return (
                f"the request needs {name} of at least {need}, but profile {profile.name!r} has "
                f"{name} = {getattr(profile, name)}; use a larger profile, or {smaller}"
            )
    return None


def fits(plan: AnyPlan, profile: Profile) -> bool:
    """Whether a plan fits a profile, shortened where it may be."""
    try:
        plan.fitted(profile)
    except ProfileError:
        return False
    return True


def fit_profile(plans: list[AnyPlan], round_up: bool, most: int = 8) -> Profile:
    """The smallest profile for these requests, for runtimes that take any shape.

    round_up: to coarser sizes, so that a compiled program is reused by the next requests. most: rows at most.
    """

    def up(value: int, step: int) -> int:
        return -(-max(value, 1) // step) * step if round_up else max(value, 1)

    text = min(512, up(max(plan.tokens("text") for plan in plans), 64))
    patches = up(max(plan.tokens("vit") for plan in plans), 64)
    latents = up(max(plan.latents() for plan in plans), 64)
    base = Profile("fitted", min(most, sum(plan.contexts() for plan in plans)), 1, text, patches, latents)
    slots = max(slots_together(plans, base), max(plan.peak(text, patches, latents)[1] for plan in plans))
    # Ids of broken characters can come back from text as three each, and these shapes can still be chosen. The
    # price is attention over more masked slots.
    slots += max(plan.spare for plan in plans)
    return dataclasses.replace(base, slots=up(slots, 256))


def slots_together(plans: list[AnyPlan], profile: Profile) -> int:
    """Slots with which these requests can share batches: while one is drawn, a program writes a padded image after
    what every other row holds; while one is written, a token."""
    filled = max(plan.peak(profile.text, profile.patches, profile.latents)[0] for plan in plans)
    return filled + (profile.latents + 2 if any(plan.draws for plan in plans) else 1)
