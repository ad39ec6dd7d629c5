"""Requests for texts and pictures in turn: each round writes a text and, unless that is the last, draws a picture.

Two rules say what the rounds read. "rebuilt" is Bagel-Zebra-CoT's: each text and each picture is a request of its own on
all that was said, so that all guidance contexts hold what was written and drawn; for a text, images are read without
their latents. "main" is ThinkMorph's: one context grows, and those of guidance stay as the inputs left them; a picture is
drawn where the text asks for it.
"""

import bisect
import dataclasses
from dataclasses import dataclass
from functools import cached_property

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.errors import ProfileError
from bagel_opt.images import Canvas, InputImage
from bagel_opt.options import Options
from bagel_opt.profile import Profile
from bagel_opt.sampling.contexts import Block, Item, contexts, evaluated, image_blocks
from bagel_opt.sampling.flow import FlowStep
from bagel_opt.sampling.pictures import draw_noise, picture_size, planned_image
from bagel_opt.sampling.plan import LEAST_TOKENS, Plan, lack

MARKER = "<image_start>"  # in ThinkMorph's texts
CHUNK = 64  # tokens, at least, in which written texts are read where shapes are fitted
PARAGRAPH = 8 * LEAST_TOKENS  # rounds of shorter texts are given up, down to one


@dataclass(frozen=True, eq=False)
class Interleaved:
    """The plan of such a request, on which `Plan`s of single texts and pictures are made as it goes.

    options: with a seed, of which round r takes seed + r. config: with the request's sides of images. opening, items,
    images: what is read at first. rounds: at most so many. max_tokens: of each text.
    """

    options: Options
    config: BagelConfig
    opening: list[Block]
    items: list[Item]
    images: list[InputImage]
    negative: Block | None
    steps: list[FlowStep]
    rounds: int
    max_tokens: int

    draws = writes = True
    thinks = False
    resized = None

    @cached_property
    def phases(self) -> list[Plan]:
        """All texts and pictures, in order, each text as long as may be."""
        course, found = Course(self), []
        for number in range(self.rounds):
            course.begin(number)
            found += [course.writing(), course.drawing(Block("text", self.max_tokens + 1))]
            if number + 1 < self.rounds:
                course.read(self.planned(found[-1]))
        return found

    def planned(self, phase: Plan) -> InputImage:
        """How a picture will be read once it is drawn."""
        height, width = phase.canvas.size
        return planned_image((width, height), self.config, f"the picture that is drawn, {width}x{height},")

    @property
    def main(self) -> list[Block]:
        """What the first text is written after."""
        return self.phases[0].main

    @property
    def canvas(self) -> Canvas:
        """Of the first picture."""
        return self.phases[1].canvas

    @property
    def spare(self) -> int:
        """Slots for texts that are longer when they are read again."""
        return 2 * self.max_tokens * self.rounds

    def contexts(self) -> int:
        return max(phase.contexts() for phase in self.phases)

    def tokens(self, kind: str) -> int:
        """As `Plan.tokens`, but of texts those that are known: what is written is read in as many chunks as it takes."""
        if kind != "text":
            return max(phase.tokens(kind) for phase in self.phases)
        known = [
            *self.opening,
            *(item for item in self.items if isinstance(item, Block)),
            *filter(None, [self.negative]),
        ]
        return max([min(CHUNK, self.max_tokens + 1), *(block.length for block in known)])

    def latents(self) -> int:
        return max(phase.latents() for phase in self.phases)

    def peak(self, text: int, patches: int, latents: int) -> tuple[int, int]:
        """As `Plan.peak`."""
        filled, touched = zip(*(phase.peak(text, patches, latents) for phase in self.phases), strict=True)
        return max(filled), max(touched)

    def fitted(self, profile: Profile) -> "Interleaved":
        """With the most rounds for which this profile has room and then with the longest texts, where neither was asked for.
        Raises ProfileError."""
        fewest = self.rounds if self.options.max_rounds is not None else 1
        for rounds in range(self.rounds, fewest - 1, -1):
            least = LEAST_TOKENS if rounds == fewest else PARAGRAPH
            plan = dataclasses.replace(self, rounds=rounds)._shortened(profile, least)
            if not (lacking := lack(plan, profile, "fewer max_rounds")):
                return plan
        raise ProfileError(lacking)

    def _shortened(self, profile: Profile, least: int) -> "Interleaved":
        if self.options.max_think_tokens is not None or self.max_tokens <= least:
            return self

        def need(tokens: int) -> int:
            sizes = profile.text, profile.patches, profile.latents
            return dataclasses.replace(self, max_tokens=tokens).peak(*sizes)[1]

        lengths = range(least, self.max_tokens + 1)
        longest = bisect.bisect_right(lengths, profile.slots, key=need)
        return dataclasses.replace(self, max_tokens=lengths[max(0, longest - 1)])

    def ends(self, text: str) -> bool:
        """Whether a text is the last: it holds a stop text, or does not hold what asks for a picture."""
        marker = self.options.draw_marker
        if marker is None:
            marker = MARKER if self.options.interleaved_context == "main" else ""
        return marker not in text or any(stop in text for stop in self.options.stops)


class Course:
    """How far an interleaved request has come: what the text or the picture that is next reads."""

    def __init__(self, plan: Interleaved):
        self.plan, self.items, self.images = plan, list(plan.items), list(plan.images)
        self.round, self.unread = 0, 0  # the first image that is read in this round for the first time
        self.noise, self.vae_noise = None, []
        self.rebuilt = plan.options.interleaved_context == "rebuilt"
        self.size = picture_size(plan.options, self.images, plan.config)
        self.main, *self.guidance = self._contexts(draws=True)

    def begin(self, number: int) -> None:
        """Begins a round."""
        self.round = number

    def draw_noise(self) -> None:
        """Of this round: that of its picture, then that of the images that are read anew, as one seed gives them."""
        first = 0 if self.rebuilt else self.unread
        options = self._options("image")
        self.noise, found = draw_noise(options, self._canvas(), self.images[first:], self.plan.config)
        self.vae_noise[first:] = found

    def writing(self) -> Plan:
        main = self._contexts(draws=False)[0] if self.rebuilt else list(self.main)
        vae_noise, tokens = list(self.vae_noise), self.plan.max_tokens
        return Plan(self._options("text"), main, None, None, self.images, max_tokens=tokens, vae_noise=vae_noise)

    def drawing(self, text: Block) -> Plan:
        """After this text."""
        self.items.append(text)
        self.main.append(text)
        main, *guidance = self._contexts(draws=True) if self.rebuilt else (list(self.main), *self.guidance)
        kept = evaluated(self.plan.options, self.plan.steps)
        cfg_text, cfg_img = (blocks if keep else None for blocks, keep in zip(guidance, kept, strict=True))
        return Plan(
            self._options("image"),
            main,
            cfg_text,
            cfg_img,
            self.images,
            self.plan.steps,
            self._canvas(),
            noise=self.noise,
            vae_noise=list(self.vae_noise),
        )

    def read(self, picture: InputImage) -> None:
        """Takes what was drawn into what the next round reads."""
        self.unread = len(self.images)
        self.images.append(picture)
        self.items.append(self.unread)
        self.main += image_blocks(self.unread, picture, draws=True)

    def _contexts(self, draws: bool) -> tuple[list[Block], list[Block], list[Block]]:
        plan = self.plan
        return contexts(plan.opening, self.items, self.images, draws, plan.negative)

    def _canvas(self) -> Canvas:
        """Of this round's picture: unless a size was asked for it has that of the last image, or with "main" of the last
        input."""
        size = picture_size(self.plan.options, self.images, self.plan.config) if self.rebuilt else self.size
        return Canvas(self.plan.config, images.latent_grid(*size, self.plan.config))

    def _options(self, output: str) -> Options:
        """Of a text or a picture by itself."""
        seed = (self.plan.options.seed + self.round) % 2**63
        return dataclasses.replace(self.plan.options, output=output, think=False, stop=None, seed=seed)
