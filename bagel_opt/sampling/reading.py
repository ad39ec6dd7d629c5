"""What a row reads: texts, those of all requests together, and images one after another."""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from bagel_opt.programs.signatures import one_row
from bagel_opt.sampling.adapters import as_inputs
from bagel_opt.sampling.batches import Batches, Context, padded
from bagel_opt.sampling.calls import neighbours
from bagel_opt.sampling.contexts import Block
from bagel_opt.sampling.encoders import Encoders
from bagel_opt.sampling.plan import Plan


@dataclass(frozen=True)
class Reading:
    """Wanted: that a row reads the ids of a text, which one call of the program "text" takes. share: how much of each adapter
    counts."""

    context: Context
    ids: list[int]
    share: np.ndarray


class Reader:
    """Of a request. share: how much of each adapter counts for it."""

    def __init__(self, batches: Batches, encoded: Encoders, share: np.ndarray):
        self.batches, self.encoded, self.share = batches, encoded, share

    def begin(self, plan: Plan) -> None:
        """What can be done for a plan's images before it is their turn."""
        for block in plan.main:
            if block.kind == "vit":
                self.encoded.begin(block.image, plan.images[block.image])

    def read(self, context: Context, blocks: list[Block], plan: Plan) -> Generator:
        """Extends one row's context block by block. What was written is counted before others get to run, since a
        program that this row takes no part in writes after what it holds."""
        text, config = self.batches.profile.text, self.batches.config
        for together in _in_one_call(blocks, text):
            block = together[0]
            if block.start is not None:
                context.position = block.start
            if block.kind == "text":
                ids = list(itertools.chain.from_iterable(one.ids for one in together))
                for start in range(0, len(ids), text):
                    yield Reading(context, ids[start : start + text], self.share)
            elif block.kind == "vit":
                yield None
                size = self.batches.size("patches", block.tokens)
                seen = yield from self.encoded.embeddings(block.image, plan.images[block.image], size)
                self._run("vit_context", [seen], context, block, size)
            else:  # clean latents, at time 0
                yield None
                size = self.batches.size("latents", block.tokens)
                index = padded(plan.images[block.image].canvas.places, size)
                latents = padded((yield from self.latents(block.image, plan)), size)
                time = np.zeros((1, *config.time_shape(size)), np.float32)
                name = one_row("generate", self.batches.profile)
                self._run(name, [latents[None], time, index[None]], context, block, size)
            for one, left in zip(together, _left(together), strict=True):
                context.blocks.append(one)
                context.marks.append((context.kv_len - left, context.position - left))

    def latents(self, image: int, plan: Plan) -> Generator:
        return self.encoded.latents(image, plan.images[image], plan.vae_noise[image])

    def _run(self, program: str, inputs: list, context: Context, block: Block, size: int) -> None:
        position = block.placed(context.position, size)[None]
        numbers = [np.array([value], np.int64) for value in (block.tokens, context.kv_len)]
        given = [*inputs, position, *numbers, *as_inputs(self.share[None])]
        self.batches.runtime.run(program, given, self.batches[context.batch].caches, context.row)
        context.read(block.length, block.positions)


class Texts:
    """Reads the texts that are wanted in rows of all batches."""

    def __init__(self, batches: Batches):
        self.batches, self.runtime, self.profile = batches, batches.runtime, batches.profile

    def __call__(self, wanted: Sequence[Reading]) -> list[MemoryError | None]:
        """Reads them: of neighbouring rows together where the program takes them, but of no more tokens than another program has
        room for. -> what keeps which of them from being read"""
        found, p, lacking = {self.batches.at(one.context): one for one in wanted}, self.profile, {}
        most = max(p.text, p.patches, p.rows * p.latents) // p.text if self.runtime.free_texts else 1
        for batch in range(p.batches):
            rows = [at for at in sorted(found) if at // p.rows == batch]
            for run in neighbours(rows):
                for start in range(run.start, run.stop, most):
                    part = range(start, min(start + most, run.stop))
                    answers = self.batches.together("text", self._read, [found[at] for at in part])
                    lacking |= zip(part, answers, strict=True)
        return [lacking[self.batches.at(one.context)] for one in wanted]

    def _read(self, wanted: Sequence[Reading]) -> list[None]:
        """Of neighbouring rows, in one call."""
        texts, contexts = [one.ids for one in wanted], [one.context for one in wanted]
        size = self.batches.size("text", max(map(len, texts)))
        ids = np.stack([padded(np.array(text, np.int64), size) for text in texts])
        numbers = [
            np.array(values, np.int64) for values in zip(*((c.position, c.kv_len) for c in contexts), strict=True)
        ]
        inputs = [ids, *numbers, *as_inputs(np.stack([one.share for one in wanted]))]
        first = contexts[0]
        rows = slice(first.row, first.row + len(contexts))
        self.runtime.run("text", inputs, self.batches[first.batch].caches, rows)
        for context, text in zip(contexts, texts, strict=True):
            context.read(len(text), len(text))
        return [None] * len(wanted)


def _in_one_call(blocks: list[Block], most: int) -> list[list[Block]]:
    """Each block by itself, but texts that follow each other together, up to so many tokens."""
    found: list[list[Block]] = []
    for block in blocks:
        follows = found and block.kind == found[-1][-1].kind == "text" and block.start is None
        if follows and sum(text.length for text in found[-1]) + block.length <= most:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _left(texts: list[Block]) -> list[int]:
    """How many tokens come after each."""
    return [sum(text.length for text in texts[number + 1 :]) for number in range(len(texts))]
