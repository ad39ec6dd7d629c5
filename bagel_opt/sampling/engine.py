"""One sampling loop for every runtime: requests as coroutines over common static rows.

A request runs by itself until it needs a token or a velocity; the engine then serves all requests that wait for the
same in one call per batch. Between programs a request is nothing but lengths: which rows it has, how many slots of
them are valid, which position comes next.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.errors import ProfileError
from bagel_opt.profile import Profile
from bagel_opt.request import RENORM_TYPES, StepEvent
from bagel_opt.runtime.base import Runtime, Tensor
from bagel_opt.sampling.flow import MAX_ORDER, FlowStep, TaylorSeer
from bagel_opt.sampling.plan import Block, Plan, slots_together
from bagel_opt.tokenizer import Tokenizer


@dataclass
class Context:
    """One row: what it has read so far, as lengths. `marks[k]` is (kv_len, position) after the first k blocks."""

    batch: int
    row: int
    kv_len: int = 0
    position: int = 0
    marks: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    seer: TaylorSeer | None = None


@dataclass
class Token:
    """Wanted: the token after `id`."""

    id: int
    temperature: float
    uniform: float


@dataclass
class Job:
    """A request on its way. cfg_text and cfg_img may be main itself, or each other, where they hold the same."""

    index: int
    plan: Plan
    main: Context
    cfg_text: Context
    cfg_img: Context
    work: Generator | None = None
    want: "Token | FlowStep | None" = None
    encoded: dict[tuple[str, int], Any] = field(default_factory=dict)

    @property
    def contexts(self) -> list[Context]:
        return list({id(c): c for c in (self.main, self.cfg_text, self.cfg_img)}.values())

    def branches(self) -> list[Context]:
        """The contexts that the wanted flow step evaluates."""
        return self.contexts if self.want.guided else [self.main]


class Engine:
    """Serves one list of requests. Nothing of it outlives the call but the runtime's weights and programs."""

    def __init__(self, runtime: Runtime, config: BagelConfig, tokenizer: Tokenizer, profile: Profile):
        self.runtime, self.config, self.tokenizer, self.profile = runtime, config, tokenizer, profile
        self.free = [(batch, row) for batch in range(profile.batches) for row in range(profile.rows)]
        self.caches: list[list[Tensor] | None] = [None] * profile.batches
        self.x: list[Tensor] = [None] * profile.batches  # latents [rows, latents, channels] of each batch
        self.factors: list[Tensor] = [None] * profile.batches  # TaylorSeer's, where a request uses it
        self.active: list[Job] = []
        self.results: list[list | Exception] = []

    def run(self, plans: list[Plan]) -> list[list | Exception]:
        """The outputs of each request, in order; the exception in place of a request that failed by itself."""
        waiting = deque(enumerate(plans))
        self.results = [[] for _ in plans]
        while waiting or self.active:
            while waiting and self._admits(waiting[0][1]):
                self._start(*waiting.popleft())
            while idle := [job for job in self.active if job.want is None]:
                for job in idle:
                    self._advance(job)
            if jobs := [job for job in self.active if isinstance(job.want, Token)]:
                self._serve(jobs, self._decode)
            if jobs := [job for job in self.active if isinstance(job.want, FlowStep)]:
                self._serve(jobs, self._denoise)
        return self.results

    # ---- requests coming and going

    def _admits(self, plan: Plan) -> bool:
        if not self.active:
            return True
        together = [job.plan for job in self.active] + [plan]
        return plan.contexts() <= len(self.free) and slots_together(together, self.profile) <= self.profile.slots

    def _start(self, index: int, plan: Plan) -> None:
        def context() -> Context:
            return Context(*self.free.pop(0), seer=TaylorSeer() if plan.options.step_cache else None)

        main = cfg_text = context()
        if plan.cfg_text is not None and (plan.thinks or plan.cfg_text != plan.main):
            cfg_text = context()
        if plan.cfg_img is None or (not plan.thinks and plan.cfg_img == plan.main):
            cfg_img = main
        else:
            cfg_img = cfg_text if plan.cfg_img == plan.cfg_text else context()
        job = Job(index, plan, main, cfg_text, cfg_img)
        job.work = self._work(job)
        self.active.append(job)
        for c in job.contexts:
            if self.caches[c.batch] is None:
                self.caches[c.batch] = self.runtime.caches(self.profile.rows, self.profile.slots)

    def _advance(self, job: Job, value: Any = None) -> None:
        """Runs a request until it wants something; a failure of its own ends it alone."""
        try:
            job.want = job.work.send(value)
        except StopIteration as done:
            self._end(job, done.value)
        except Exception as error:
            self._end(job, error)

    def _end(self, job: Job, result: list | Exception) -> None:
        self.results[job.index] = result
        self.active.remove(job)
        self.free = sorted(self.free + [(c.batch, c.row) for c in job.contexts])

    def _serve(self, jobs: list[Job], program: Any) -> None:
        try:
            answers = program(jobs)
        except Exception as error:
            for job in jobs:
                self._end(job, error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                self._advance(job, answer)

    # ---- one request

    def _work(self, job: Job) -> Generator:
        """A request from its first block to its last output. Yields what it wants; None lets others go on."""
        plan, outputs = job.plan, []
        yield from self._prefill(job, job.main, plan.main)
        if plan.writes:
            outputs.append((yield from self._write(job)))
        if not plan.draws:
            return outputs
        if plan.thinks:
            ids = self.tokenizer.block(outputs[0])
            self._check_thought(job, len(ids))
            yield from self._prefill(job, job.main, [Block("text", len(ids), ids)])
        for context, blocks in ((job.cfg_text, plan.cfg_text), (job.cfg_img, plan.cfg_img)):
            if context is not job.main and len(context.marks) == 1:
                shared = self._share(job, context, blocks)
                yield from self._prefill(job, context, blocks[shared:])
        job.encoded.clear()
        tokens = yield from self._draw(job)
        outputs.append(self._picture(plan, tokens))
        return outputs

    def _share(self, job: Job, context: Context, blocks: list[Block]) -> int:
        """Copies from the main row what both contexts begin with; how many blocks that is."""
        shared = 0
        while shared < min(len(blocks), len(job.plan.main)) and blocks[shared] == job.plan.main[shared]:
            shared += 1
        context.marks = job.main.marks[: shared + 1]
        context.kv_len, context.position = context.marks[-1]
        if shared:
            source, target = self.caches[job.main.batch], self.caches[context.batch]
            self.runtime.copy_row(source, job.main.row, target, context.row, context.kv_len)
        return shared

    def _check_thought(self, job: Job, length: int) -> None:
        p, c = self.profile, job.main
        need = max(c.kv_len + -(-length // p.text) * p.text, c.kv_len + length + p.latents + 2)
        if need > p.slots:
            raise ProfileError(
                f"the thought of {length} tokens needs slots of at least {need}, but profile {p.name!r} has "
                f"slots = {p.slots}; use a larger profile or fewer max_think_tokens"
            )

    def _prefill(self, job: Job, context: Context, blocks: list[Block]) -> Generator:
        """Extends one row's context block by block. What was written is counted before others get to run, since a
        program that this row takes no part in writes after what it holds."""
        caches, p = self.caches[context.batch], self.profile

        def run(program: str, inputs: list, lengths: list[int], slots: int, positions: int) -> None:
            numbers = [np.array([value], np.int64) for value in (context.position, *lengths, context.kv_len)]
            self.runtime.run(program, inputs + numbers, caches, context.row)
            context.kv_len += slots
            context.position += positions

        for block in blocks:
            if block.kind == "text":
                for start in range(0, block.length, p.text):
                    chunk = np.array(block.ids[start : start + p.text], np.int64)
                    run("text", [_padded(chunk, p.text)[None]], [], len(chunk), len(chunk))
                    yield None
            else:
                if block.kind == "vit":
                    inputs = [self._embeddings(job, block.image)]
                else:
                    grid = job.plan.images[block.image].vae_grid
                    index = _padded(images.positions(*grid, self.config.latent_side), p.latents)
                    inputs = [_padded(self._latents(job, block.image), p.latents)[None], index[None]]
                run(f"{block.kind}_context", inputs, [block.length - 2], block.length, 1)
                yield None
            context.marks.append((context.kv_len, context.position))

    def _embeddings(self, job: Job, image: int) -> Tensor:
        """ViT embeddings of an input image, computed once per request."""
        if ("vit", image) not in job.encoded:
            picture, p, side = job.plan.images[image], self.profile, self.config.vit_side
            patches = images.tokens(images.pixels(picture.vit), self.config.vit.patch_size)
            index = _padded(images.positions(*picture.vit_grid, side), p.patches)
            inputs = [_padded(patches, p.patches)[None], index[None], np.array([len(patches)], np.int64)]
            job.encoded["vit", image] = self.runtime.run("vit", inputs)[0]
        return job.encoded["vit", image]

    def _latents(self, job: Job, image: int) -> np.ndarray:
        """Latent tokens [tokens, channels] of an input image, drawn once per request from the VAE's posterior."""
        if ("vae", image) not in job.encoded:
            pixels = images.pixels(job.plan.images[image].vae)
            moments = self.runtime.host(self.runtime.run("vae_encode", [pixels[None]])[0])
            mean, log_variance = np.split(moments, 2, axis=1)
            z = mean + np.exp(np.float32(0.5) * log_variance) * job.plan.vae_noise[image]
            scaled = np.float32(self.config.vae.scale_factor) * (z - np.float32(self.config.vae.shift_factor))
            job.encoded["vae", image] = images.tokens(scaled[0], self.config.latent_patch_size)
        return job.encoded["vae", image]

    def _write(self, job: Job) -> Generator:
        """Generates text after the main context and takes its slots back: a thought is encoded anew."""
        options, context, ids = job.plan.options, job.main, [self.config.special.bos_token_id]
        uniform = np.random.default_rng(options.seed)
        before = context.kv_len, context.position
        while len(ids) < job.plan.max_tokens:  # the official count includes the start token
            temperature = options.text_temperature if options.do_sample else 0.0
            token = yield Token(ids[-1], temperature, uniform.random(dtype=np.float32))
            context.kv_len, context.position = context.kv_len + 1, context.position + 1
            if token == self.config.special.eos_token_id:
                break
            ids.append(token)
            if options.on_token:
                options.on_token(token)
        context.kv_len, context.position = before
        return self.tokenizer.decode(ids)

    def _draw(self, job: Job) -> Generator:
        """Denoises the picture's latent tokens [tokens, channels]."""
        p, on_step = self.profile, job.plan.options.on_step
        for c in job.contexts:
            if self.x[c.batch] is None:
                self.x[c.batch] = self.runtime.zeros((p.rows, p.latents, self.config.latent_dim))
            self.x[c.batch] = self.runtime.write_row(self.x[c.batch], c.row, job.plan.noise)
        for index, step in enumerate(job.plan.steps):
            seen = yield step
            if on_step:
                on_step(StepEvent(index, len(job.plan.steps), step.t, *map(_public, seen)))
        return self.runtime.host(self.x[job.main.batch], job.main.row)[: len(job.plan.noise)]

    def _picture(self, plan: Plan, tokens: np.ndarray) -> Image.Image:
        latent = images.untokens(tokens, *plan.grid, self.config.latent_patch_size)
        return Image.fromarray(self.runtime.host(self.runtime.run("vae_decode", [latent[None]])[0]))

    # ---- all requests that wait for the same

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """kv_len and position of every row of all batches. A row that takes no part is written after what it holds."""
        kv_len = np.zeros(len(self.caches) * self.profile.rows, np.int64)
        position = np.zeros_like(kv_len)
        for job in self.active:
            for c in job.contexts:
                kv_len[self._at(c)], position[self._at(c)] = c.kv_len, c.position
        return kv_len, position

    def _at(self, c: Context) -> int:
        return c.batch * self.profile.rows + c.row

    def _batch(self, array: np.ndarray, batch: int) -> np.ndarray:
        return array[batch * self.profile.rows : (batch + 1) * self.profile.rows]

    def _decode(self, jobs: list[Job]) -> list[int]:
        """The next token of each of these requests."""
        kv_len, position = self._lengths()
        ids = np.zeros_like(kv_len)
        temperature, uniform = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
        for job in jobs:
            at, want = self._at(job.main), job.want
            ids[at], temperature[at], uniform[at] = want.id, want.temperature, want.uniform
        for batch in {job.main.batch for job in jobs}:
            inputs = [self._batch(array, batch) for array in (ids, position, kv_len)]
            logits = self.runtime.run("decode", inputs, self.caches[batch])[0]
            choice = [self._batch(array, batch) for array in (temperature, uniform)]
            self._batch(ids, batch)[:] = self.runtime.host(self.runtime.run("choose", [logits, *choice])[0])
        return [int(ids[self._at(job.main)]) for job in jobs]

    def _denoise(self, jobs: list[Job]) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """One flow step of each of these requests; (x_t, v_t) for those that watch."""
        kv_len, position = self._lengths()
        rows, p = len(kv_len), self.profile
        cond, text, img = (np.arange(rows) for _ in range(3))
        text_scale, img_scale, renorm_min, dt, t = (np.zeros(rows, np.float32) for _ in range(5))
        renorm, n, n_evaluated = (np.zeros(rows, np.int64) for _ in range(3))
        index = np.zeros((rows, p.latents), np.int64)
        differences, distance = np.full(rows, -1), np.zeros(rows, np.float32)
        predicted = np.zeros(rows, np.float32)
        for job in jobs:
            options, step, grid = job.plan.options, job.want, job.plan.grid
            places = images.positions(*grid, self.config.latent_side)
            for c in job.contexts:
                at = self._at(c)
                cond[at], text[at], img[at] = (self._at(b) for b in (job.main, job.cfg_text, job.cfg_img))
                text_scale[at] = options.cfg_text_scale if step.guided else 0
                img_scale[at] = options.cfg_img_scale if step.guided else 0
                renorm_min[at], renorm[at] = options.cfg_renorm_min, RENORM_TYPES.index(options.cfg_renorm_type)
                dt[at], n[at] = step.dt, len(places)
            for c in job.branches():
                at = self._at(c)
                if c.seer is None or c.seer.next():
                    t[at], n_evaluated[at], index[at, : len(places)] = step.t, len(places), places
                    if c.seer:
                        differences[at], distance[at] = c.seer.store()
                else:
                    predicted[at] = c.seer.distance
        x, v = list(self.x), list(self.x)
        for batch in range(p.batches):
            if x[batch] is None:  # no request draws there; any tensor of the shape will do
                x[batch] = v[batch] = self.runtime.zeros((p.rows, p.latents, self.config.latent_dim))
            mine = [self._batch(array, batch) for array in (t, index, position, n_evaluated, kv_len)]
            if mine[3].any():
                v[batch], hidden = self.runtime.run("generate", [x[batch], *mine], self.caches[batch])
                self._remember(batch, hidden, differences, distance)
            if self._batch(predicted, batch).any():
                inputs = [self._batch(predicted, batch), v[batch], self.factors[batch]]
                v[batch] = self.runtime.run("taylor_predict", inputs)[0]
        numbers = [cond, text, img, text_scale, img_scale, renorm_min, renorm, dt, n]
        out = self.runtime.run("step", [*numbers, *x, *v])
        self.x, v = list(out[: p.batches]), out[p.batches :]
        return [self._watched(job, x, v) for job in jobs]

    def _remember(self, batch: int, hidden: Tensor, differences: np.ndarray, distance: np.ndarray) -> None:
        """Stores the last layer's output for TaylorSeer, where a request of the batch uses it."""
        taken = self._batch(differences, batch)
        if (taken < 0).all():
            return
        p, channels = self.profile, self.config.llm.hidden_size
        if self.factors[batch] is None:
            self.factors[batch] = self.runtime.zeros((MAX_ORDER + 1, p.rows, p.latents, channels), hidden=True)
        inputs = [hidden, taken, self._batch(distance, batch), self.factors[batch]]
        self.factors[batch] = self.runtime.run("taylor_update", inputs)[0]

    def _watched(self, job: Job, x: list[Tensor], v: list[Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        if not job.plan.options.on_step:
            return None
        c, n = job.main, len(job.plan.noise)
        return tuple(self.runtime.host(tensor[c.batch], c.row)[:n] for tensor in (x, v))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """The array with zeros after it, up to a static length."""
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _public(array: np.ndarray) -> Any:
    """A torch tensor for callers who have torch."""
    try:
        import torch
    except ImportError:
        return array
    return torch.from_numpy(np.array(array))
