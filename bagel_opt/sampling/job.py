"""One request as a coroutine: it fills its contexts, writes its text and draws its picture."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.errors import ProfileError
from bagel_opt.options import StepEvent
from bagel_opt.programs.interface import Tensor
from bagel_opt.programs.signatures import one_row
from bagel_opt.sampling.batches import Batches, Context, padded
from bagel_opt.sampling.flow import FlowStep
from bagel_opt.sampling.plan import Block, Plan
from bagel_opt.tokenizer import Tokenizer

NOT_FINITE = "are NaN or infinite: weights are damaged, or numbers overflow; use dtype float32 or bfloat16"


@dataclass(frozen=True)
class Token:
    """Wanted: the token after `id`."""

    id: int
    temperature: float
    uniform: float


@dataclass(frozen=True)
class Observer:
    """Who watches a request on its way. on_step, on_token: as in Options; on_denoising(begins): as the flow begins, from
    filled contexts, and as its latents are on the host."""

    on_step: Callable[[StepEvent], Any] | None = None
    on_token: Callable[[int], Any] | None = None
    on_denoising: Callable[[bool], Any] | None = None


class Job:
    """A request on its way. `work` yields what it wants, a Token or a FlowStep, or None to let others go on.

    cfg_text and cfg_img may be main itself, or each other, where they hold the same.
    """

    def __init__(self, plan: Plan, batches: Batches, tokenizer: Tokenizer, observer: Observer = Observer()):
        self.plan, self.batches, self.tokenizer, self.observer = plan, batches, tokenizer, observer
        self.runtime, self.config, self.profile = batches.runtime, batches.config, batches.profile
        self.contexts: list[Context] = []
        self.passed = 0  # how many requests that came later went first
        self.result: list | Exception | None = None
        self.want: Token | FlowStep | None = None
        self.remembered: Any = None  # by its step cache
        self.encoded: dict[tuple[str, int], Any] = {}
        self.work = self._work()

    def take_rows(self) -> None:
        self.contexts = [self.batches.take() for _ in range(self.plan.contexts())]
        self.main, self.cfg_text, self.cfg_img = (self.contexts[role] for role in self.plan.roles())

    @cached_property
    def places(self) -> np.ndarray:
        """Where the latent tokens of the picture to draw are in the position table."""
        return images.positions(*self.plan.grid, self.config.latent_side)

    def branches(self) -> list[Context]:
        """The contexts that the wanted flow step evaluates."""
        return self.contexts if self.want.guided else [self.main]

    def _work(self) -> Generator:
        plan, outputs = self.plan, []
        for context in self.contexts:
            self.batches.open(context)
        yield from self._prefill(self.main, plan.main)
        if plan.writes:
            outputs.append((yield from self._write()))
        if not plan.draws:
            return outputs
        if plan.thinks:
            ids = self.tokenizer.block(outputs[0])
            self._check_thought(len(ids))
            yield from self._prefill(self.main, [Block("text", len(ids), ids)])
        for role, blocks in zip(plan.roles(), (plan.main, plan.cfg_text, plan.cfg_img), strict=True):
            if role and len(self.contexts[role].marks) == 1:
                shared = self._share(self.contexts[role], blocks)
                yield from self._prefill(self.contexts[role], blocks[shared:])
        self.encoded.clear()
        tokens = yield from self._draw()
        outputs.append(self.picture(tokens))
        return outputs

    def _share(self, context: Context, blocks: list[Block]) -> int:
        """Copies from the main row what both contexts begin with; how many blocks that is."""
        main, shared = self.plan.main, 0
        while shared < min(len(blocks), len(main)) and blocks[shared] == main[shared]:
            shared += 1
        context.marks = self.main.marks[: shared + 1]
        context.kv_len, context.position = context.marks[-1]
        if shared:
            self.batches.copy_start(self.main, context)
        return shared

    def _check_thought(self, length: int) -> None:
        p, c = self.profile, self.main
        need = max(c.kv_len + -(-length // p.text) * p.text, c.kv_len + length + p.latents + 2)
        if need > p.slots:
            raise ProfileError(
                f"the thought of {length} tokens needs slots of at least {need}, but profile {p.name!r} has "
                f"slots = {p.slots}; use a larger profile or fewer max_think_tokens"
            )

    def _prefill(self, context: Context, blocks: list[Block]) -> Generator:
        """Extends one row's context block by block. What was written is counted before others get to run, since a
        program that this row takes no part in writes after what it holds."""
        caches, p = self.batches[context.batch].caches, self.profile

        def run(program: str, inputs: list, lengths: list[int], slots: int, positions: int) -> None:
            numbers = [np.array([value], np.int64) for value in (context.position, *lengths, context.kv_len)]
            self.runtime.run(program, inputs + numbers, caches, context.row)
            context.kv_len += slots
            context.position += positions

        for block in blocks:
            if block.kind == "text":
                for start in range(0, block.length, p.text):
                    chunk = np.array(block.ids[start : start + p.text], np.int64)
                    run("text", [padded(chunk, p.text)[None]], [], len(chunk), len(chunk))
                    yield None
            elif block.kind == "vit":
                run("vit_context", [self._embeddings(block.image)], [block.length - 2], block.length, 1)
                yield None
            else:  # clean latents, at time 0
                grid = self.plan.images[block.image].vae_grid
                index = padded(images.positions(*grid, self.config.latent_side), p.latents)
                latents = padded(self._latents(block.image), p.latents)
                inputs = [latents[None], np.zeros(1, np.float32), index[None]]
                run(one_row("generate", p), inputs, [block.length - 2], block.length, 1)
                yield None
            context.marks.append((context.kv_len, context.position))

    def _embeddings(self, image: int) -> Tensor:
        """ViT embeddings of an input image, computed once per request."""
        if ("vit", image) not in self.encoded:
            picture, p, side = self.plan.images[image], self.profile, self.config.vit_side
            patches = images.tokens(images.pixels(picture.vit), self.config.vit.patch_size)
            index = padded(images.positions(*picture.vit_grid, side), p.patches)
            inputs = [padded(patches, p.patches)[None], index[None], np.array([len(patches)], np.int64)]
            self.encoded["vit", image] = self.runtime.run("vit", inputs)[0]
        return self.encoded["vit", image]

    def _latents(self, image: int) -> np.ndarray:
        """Latent tokens [tokens, channels] of an input image, drawn once per request from the VAE's posterior."""
        if ("vae", image) not in self.encoded:
            pixels = images.pixels(self.plan.images[image].vae)
            moments = self.runtime.host(self.runtime.run("vae_encode", [pixels[None]])[0])
            mean, log_variance = np.split(moments, 2, axis=1)
            z = mean + np.exp(np.float32(0.5) * log_variance) * self.plan.vae_noise[image]
            scaled = np.float32(self.config.vae.scale_factor) * (z - np.float32(self.config.vae.shift_factor))
            self.encoded["vae", image] = images.tokens(scaled[0], self.config.latent_patch_size)
        return self.encoded["vae", image]

    def _write(self) -> Generator:
        """Generates text after the main context and takes its slots back: a thought is encoded anew."""
        options, context, ids = self.plan.options, self.main, [self.config.special.bos_token_id]
        uniform = np.random.default_rng(options.seed)
        before = context.kv_len, context.position
        while len(ids) < self.plan.max_tokens:  # the official count includes the start token
            temperature = options.text_temperature if options.do_sample else 0.0
            token = yield Token(ids[-1], temperature, uniform.random(dtype=np.float32))
            if token < 0:
                raise FloatingPointError(f"the text's logits {NOT_FINITE}")
            context.kv_len, context.position = context.kv_len + 1, context.position + 1
            if token == self.config.special.eos_token_id:
                break
            ids.append(token)
            if self.observer.on_token:
                self.observer.on_token(token)
            if ends(self.tokenizer, ids, options.stops):
                break
        context.kv_len, context.position = before
        return before_stops(self.tokenizer.decode(ids), options.stops)

    def _draw(self) -> Generator:
        """Denoises the picture's latent tokens [tokens, channels]."""
        noise, steps, observer = self.plan.noise, self.plan.steps, self.observer
        if observer.on_denoising:
            observer.on_denoising(True)
        for context in self.contexts:
            self.batches.set_latents(context, noise)
        for index, step in enumerate(steps):
            seen = yield step
            if observer.on_step:
                observer.on_step(StepEvent(index, len(steps), step.t, *map(_public, seen)))
        tokens = self.batches.latents(self.main, len(noise))
        if observer.on_denoising:
            observer.on_denoising(False)
        if not np.isfinite(tokens).all():
            raise FloatingPointError(f"the picture's latents {NOT_FINITE}, or smaller guidance scales")
        return tokens

    def picture(self, tokens: np.ndarray) -> Image.Image:
        """Latent tokens [tokens, channels] through the VAE."""
        latent = images.untokens(tokens, *self.plan.grid, self.config.latent_patch_size)
        picture, finite = map(self.runtime.host, self.runtime.run("vae_decode", [latent[None]]))
        if not finite.all():
            raise FloatingPointError(f"the decoded picture's pixels {NOT_FINITE}")
        return Image.fromarray(picture)


def ends(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> bool:
    """Whether the last of the ids <|im_start|>, ... completes one of the texts."""
    if not stops:
        return False
    last = (
        max(len(stop.encode()) for stop in stops) + 4
    )  # a token has a byte at least, but for those of a broken character
    text = tokenizer.decode([ids[0], *ids[1:][-last:]])
    return any(stop in text for stop in stops)


def before_stops(text: str, stops: tuple[str, ...]) -> str:
    """What comes before the first of the texts."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _public(array: np.ndarray) -> Any:
    """A torch tensor for callers who have torch."""
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(np.array(array))
