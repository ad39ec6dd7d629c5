"""One request as a coroutine: it fills its contexts, writes its text and draws its picture."""

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.errors import ProfileError
from bagel_opt.options import StepEvent
from bagel_opt.sampling.adapters import adapter_share
from bagel_opt.sampling.batches import Batches, Context
from bagel_opt.sampling.contexts import DRAWN, Block
from bagel_opt.sampling.encoders import Encoders
from bagel_opt.sampling.flow import FlowStep
from bagel_opt.sampling.interleaved import Course, Interleaved
from bagel_opt.sampling.pictures import read_image
from bagel_opt.sampling.plan import Plan
from bagel_opt.sampling.reading import Reader, Reading
from bagel_opt.sampling.stops import before_stops, ends
from bagel_opt.tokenizer import Tokenizer

Picture = Image.Image | list[Image.Image]  # the frames, of a video
NOT_FINITE = "are NaN or infinite: weights are damaged, or numbers overflow; use dtype float32 or bfloat16"


@dataclass(frozen=True)
class Token:
    """Wanted: the token after `id`. following: the uniform number of the one after that, where the device alone can choose it and
    the text may be so long. text: stands for the text that it is a part of."""

    id: int
    temperature: float
    uniform: float
    top_p: float
    following: float | None
    text: object


@dataclass(frozen=True)
class Observer:
    """Who watches a request on its way. on_step, on_token, on_output: as in Options; on_denoising(begins): as the flow
    begins, from filled contexts, and as its latents are on the host; on_decoded(index, total): as a part of a video has been
    decoded."""

    on_step: Callable[[StepEvent], Any] | None = None
    on_token: Callable[[int], Any] | None = None
    on_output: Callable[[str | Picture], Any] | None = None
    on_denoising: Callable[[bool], Any] | None = None
    on_decoded: Callable[[int, int], Any] | None = None


class Job:
    """A request on its way. `work` yields what it wants, a Reading, a Token or a FlowStep, or None to let others go on.

    contexts: all rows that it has. phase: the plan of the text or picture in progress, which is the request's own where
    that is not interleaved. drawn_from: the rows that take part in it; cfg_text and cfg_img may be main itself, or each
    other, where they hold the same.
    """

    def __init__(
        self, plan: Plan | Interleaved, batches: Batches, tokenizer: Tokenizer, observer: Observer = Observer()
    ):
        self.plan, self.batches, self.tokenizer, self.observer = plan, batches, tokenizer, observer
        self.runtime, self.config, self.profile = batches.runtime, batches.config, batches.profile
        self.contexts: list[Context] = []
        self.share = adapter_share(self.runtime, plan.options)
        self.passed = 0  # how many requests that came later went first
        self.turn = 0  # when it was last let go on, beside others that read
        self.result: list | Exception | None = None
        self.want: Reading | Token | FlowStep | None = None
        self.remembered: Any = None  # by its step cache
        self.encoded = Encoders(batches)
        self.reader = Reader(batches, self.encoded, self.share)
        self.phase, self.round = plan, 0
        self.work = self._work()

    def take_rows(self) -> None:
        self.contexts = [self.batches.take() for _ in range(self.plan.contexts())]

    def target(self, context: Context) -> Block:
        """What is drawn after a context, as a block."""
        return self.targets.get(id(context), DRAWN)

    def branches(self) -> list[Context]:
        """The contexts that the wanted flow step evaluates."""
        return self.drawn_from if self.want.guided else [self.main]

    def _work(self) -> Generator:
        for context in self.contexts:
            self.batches.open(context)
        run = self._interleave if isinstance(self.plan, Interleaved) else self._answer
        return (yield from run(self.plan))

    def _interleave(self, plan: Interleaved) -> Generator:
        outputs, course = [], Course(plan)
        for self.round in range(plan.rounds):
            course.begin(self.round)
            course.draw_noise()
            outputs += yield from self._answer(course.writing())
            if plan.ends(outputs[-1]):
                break
            ids = self.tokenizer.block(outputs[-1])
            outputs += yield from self._answer(course.drawing(Block("text", len(ids), ids)))
            if self.round + 1 < plan.rounds:
                course.read(read_image(outputs[-1], plan.config, "the picture that was drawn"))
        return outputs

    def _answer(self, plan: Plan) -> Generator:
        """The outputs of a plan: a text, a picture, or a thought and a picture."""
        outputs = []
        self._check_room(plan)
        self._enter(plan)
        yield from self._fill(self.main, plan.main)
        if plan.writes:
            outputs.append(self._told((yield from self._write())))
        if not plan.draws:
            return outputs
        if plan.thinks:
            ids = self.tokenizer.block(outputs[0])
            self._check_thought(len(ids))
            yield from self.reader.read(self.main, [Block("text", len(ids), ids)], plan)
        for role, blocks in zip(plan.roles(), (plan.main, plan.cfg_text, plan.cfg_img), strict=True):
            if role:
                yield from self._fill(self.contexts[role], blocks)
        if plan is self.plan:
            self.encoded.clear()
        tokens = yield from self._draw()
        outputs.append(self._told((yield from self._decode(tokens))))
        return outputs

    def _enter(self, plan: Plan) -> None:
        """Begins a plan, in rows of which some may hold what they read for the one before."""
        self.phase, self.remembered = plan, None
        self.reader.begin(plan)
        self.drawn_from = self.contexts[: plan.contexts()]
        self.main, self.cfg_text, self.cfg_img = (self.contexts[role] for role in plan.roles())
        # where the latent tokens of the picture to draw are
        self.places = plan.canvas.places if plan.canvas else np.zeros(0, np.int64)
        self.clean = plan.clean
        rows = reversed(plan.roles()[: len(plan.targets)])  # main last, whose row another may have too
        self.targets = {id(self.contexts[r]): block for r, block in zip(rows, reversed(plan.targets), strict=True)}

    def _told(self, output: str | Picture) -> str | Picture:
        if self.observer.on_output:
            self.observer.on_output(output)
        return output

    def _fill(self, context: Context, blocks: list[Block]) -> Generator:
        """Makes a row read these blocks and no others. What it or the main row begins with already is not read again."""
        own, mains = (_alike(c.blocks, blocks) for c in (context, self.main))
        if mains > own:
            context.keep(mains, self.main)
            self.batches.copy_start(self.main, context)
        else:
            context.keep(own)
        yield from self.reader.read(context, blocks[len(context.blocks) :], self.phase)

    def _check_room(self, plan: Plan) -> None:
        """Written texts may be longer when they are read again than the request was planned for."""
        p = self.profile
        sizes = p.text, p.patches, p.latents
        filled, touched = plan.peak(*sizes)
        need = max(touched, filled + p.latents + 2)  # others that draw write after what this row holds
        if plan is not self.plan and filled > self.plan.peak(*sizes)[0] and need > p.slots:
            raise ProfileError(
                f"round {self.round} needs slots of at least {need}, but profile {p.name!r} has slots = {p.slots}; "
                "use a larger profile, fewer max_think_tokens or fewer max_rounds"
            )

    def _check_thought(self, length: int) -> None:
        p, c = self.profile, self.main
        need = max(c.kv_len + -(-length // p.text) * p.text, c.kv_len + length + p.latents + 2)
        if need > p.slots:
            raise ProfileError(
                f"the thought of {length} tokens needs slots of at least {need}, but profile {p.name!r} has "
                f"slots = {p.slots}; use a larger profile or fewer max_think_tokens"
            )

    def _write(self) -> Generator:
        """Generates text after the main context and takes its slots back: a thought is encoded anew."""
        options, context, after = self.phase.options, self.main, self.phase.after
        ids = [self.config.special.bos_token_id if after is None else after]
        said = self.tokenizer.decode if after is None else self.tokenizer.answer
        numbers = np.random.default_rng(options.seed)
        uniform = numbers.random(dtype=np.float32)
        before = context.kv_len, context.position
        while len(ids) < self.phase.max_tokens:  # the official count includes the start token
            temperature = options.text_temperature if options.do_sample else 0.0
            following = numbers.random(dtype=np.float32)
            goes_on = len(ids) + 1 < self.phase.max_tokens and not (temperature and options.top_p < 1)
            token = yield Token(
                ids[-1], temperature, uniform, options.top_p, following if goes_on else None, text=numbers
            )
            uniform = following
            if token < 0:
                raise FloatingPointError(f"the text's logits {NOT_FINITE}")
            context.kv_len, context.position = context.kv_len + 1, context.position + 1
            if token == self.config.special.eos_token_id:
                break
            ids.append(token)
            if self.observer.on_token:
                self.observer.on_token(token)
            if ends(said, ids, options.stops):
                break
        context.kv_len, context.position = before
        return before_stops(said(ids), options.stops)

    def _draw(self) -> Generator:
        """Denoises the picture's latent tokens [tokens, channels]."""
        noise, steps, observer = self.phase.noise, self.phase.steps, self.observer
        if self.clean:
            first = yield from self.reader.latents(self.phase.first_image, self.phase)
            noise = np.concatenate([first, noise[self.clean :]])
        if observer.on_denoising:
            observer.on_denoising(True)
        for context in self.drawn_from:
            self.batches.set_latents(context, noise)
        for index, step in enumerate(steps):
            seen = yield step
            if observer.on_step:
                observer.on_step(StepEvent(index, len(steps), step.t, *map(_public, seen), self.round))
        tokens = self.batches.latents(self.main, len(noise))
        if observer.on_denoising:
            observer.on_denoising(False)
        if not np.isfinite(tokens).all():
            raise FloatingPointError(f"the picture's latents {NOT_FINITE}, or smaller guidance scales")
        return tokens

    def picture(self, tokens: np.ndarray) -> Image.Image:
        """What latent tokens [tokens, channels] of a picture show, at once."""
        try:
            next(self._decode(tokens))
        except StopIteration as done:
            return done.value
        raise TypeError("a video is decoded in several parts")

    def _decode(self, tokens: np.ndarray) -> Generator:
        """Latent tokens through the VAE, and in the size that was asked for; of a video its frames."""
        parts, numbers, size = self.phase.canvas.latents(tokens), itertools.count(), self.phase.resized

        def made(pixels: np.ndarray, finite: np.ndarray) -> list[Image.Image]:
            if not finite.all():
                raise FloatingPointError(f"the decoded picture's pixels {NOT_FINITE}")
            if self.observer.on_decoded and len(parts) > 1:
                self.observer.on_decoded(next(numbers), len(parts))
            found = [Image.fromarray(frame) for frame in pixels.reshape(-1, *pixels.shape[-3:])]
            return found if size is None else [images.resize_to(frame, size[::-1]) for frame in found]

        found = yield from self.encoded.in_turn("vae_decode", parts, made)
        frames = list(itertools.chain.from_iterable(found))
        return frames if self.phase.options.output == "video" else frames[0]


def _alike(one: list[Block], other: list[Block]) -> int:
    """How many blocks both begin with."""
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def _public(array: np.ndarray) -> Any:
    """A torch tensor for callers who have torch."""
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(np.array(array))
