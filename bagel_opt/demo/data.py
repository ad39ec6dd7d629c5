"""Training batches: static, padded, and a pure function of seed and step.

R rows, T text slots. In a row's order of reading, every text token has a position of its own and every image block one
position for all of it, so a token sees exactly what has no later position: text is causal, images see all of
themselves. Slots that are not used have position -1.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bagel_opt.demo import texts
from bagel_opt.demo.world import Edit, Scene, draw
from bagel_opt.sampling.planning import THINK_IMAGE, THINK_TEXT
from bagel_opt.tokenizer import Tokenizer

IGNORED = -100  # a label of cross-entropy that does not count
DROPPED = 0.1  # share of rows without the text, without the images, and so on: what guidance compares with


@dataclass(frozen=True)
class Shape:
    """A kind of batch: rows for one pair of pictures, text slots, and which image blocks there are room for."""

    rows: int
    text: int
    vit: bool
    clean: bool
    noisy: bool
    learn: bool  # whether any of the text is to be predicted


# Lengths are multiples of 128 together with the 64 slots of each image block.
SHAPES = {
    "draw": Shape(2, 64, vit=False, clean=False, noisy=True, learn=False),
    "edit": Shape(1, 64, vit=True, clean=True, noisy=True, learn=False),
    "ask": Shape(1, 64, vit=True, clean=False, noisy=False, learn=True),
    "think": Shape(1, 192, vit=True, clean=True, noisy=True, learn=True),
}


class Row:
    """One training sequence, written block by block."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.position = tokenizer, 0
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.labels: list[int] = []
        self.images = {"vit": (-1, 0), "clean": (-1, 0), "noisy": (-1, 0)}  # position and number of the picture

    def text(self, text: str, learn: bool = False) -> "Row":
        return self.block(self.tokenizer.block(text), learn)

    def block(self, ids: tuple[int, ...], learn: bool) -> "Row":
        self.ids += ids
        self.positions += range(self.position, self.position + len(ids))
        self.labels += (*ids[1:], IGNORED) if learn else (IGNORED,) * len(ids)
        self.position += len(ids)
        return self

    def image(self, picture: int, *kinds: str) -> "Row":
        special = self.tokenizer.special
        for kind in kinds:
            self.ids += special.start_of_image, special.end_of_image
            self.positions += self.position, self.position
            self.labels += IGNORED, IGNORED
            self.images[kind] = self.position, picture
            self.position += 1
        return self


class Packed(NamedTuple):
    """Rows of one kind: ids, positions and labels [R, T]; position and picture number of each image block [R]."""

    ids: Tensor
    positions: Tensor
    labels: Tensor | None
    images: dict[str, tuple[Tensor, Tensor]]


def pack(rows: list[Row], shape: Shape) -> Packed:
    """Raises ValueError where a row is longer than the shape: the batch would silently lose its end."""
    count = len(rows)
    ids = np.zeros((count, shape.text), np.int64)
    positions, labels = np.full_like(ids, -1), np.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        length = len(row.ids)
        if length > shape.text:
            raise ValueError(f"a row has {length} text tokens; the shape has {shape.text}")
        ids[i, :length], positions[i, :length], labels[i, :length] = row.ids, row.positions, row.labels
    used = {"vit": shape.vit, "clean": shape.clean, "noisy": shape.noisy}
    images = {
        kind: tuple(torch.tensor([row.images[kind][part] for row in rows]) for part in (0, 1))
        for kind, room in used.items()
        if room
    }
    ids, positions, labels = map(torch.from_numpy, (ids, positions, labels))
    return Packed(ids, positions, labels if shape.learn else None, images)


class Batches(torch.utils.data.Dataset):
    """Batch number `step`: pictures [2 * pairs, side, side, 3] in bytes, before and after an edit, and packed rows of
    every kind about them. The same seed gives the same batches, whoever asks for them and in whichever order."""

    def __init__(self, tokenizer: Tokenizer, seed: int, pairs: int, steps: int):
        self.tokenizer, self.seed, self.pairs, self.steps = tokenizer, seed, pairs, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, Packed]]:
        rng = Random(f"{self.seed} {step}")
        edits = [texts.sample_edit(rng, held_out=False) for _ in range(self.pairs)]
        rows: dict[str, list[Row]] = {kind: [] for kind in SHAPES}
        for number, edit in enumerate(edits):
            before, after = 2 * number, 2 * number + 1
            rows["draw"] += self.draw(rng, edit.before, before), self.draw(rng, edit.after, after)
            rows["edit"].append(self.edit(rng, edit, before, after))
            rows["ask"].append(self.ask(rng, edit, before))
            rows["think"].append(self.think(rng, edit, before, after))
        scenes = [scene for edit in edits for scene in (edit.before, edit.after)]
        return stack(scenes), {kind: pack(rows[kind], shape) for kind, shape in SHAPES.items()}

    def draw(self, rng: Random, scene: Scene, picture: int) -> Row:
        row = Row(self.tokenizer)
        if rng.random() > DROPPED:
            row.text(texts.sample_prompt(rng, scene)[0])
        return row.image(picture, "noisy")

    def edit(self, rng: Random, edit: Edit, before: int, after: int) -> Row:
        row, chance = Row(self.tokenizer), rng.random() / DROPPED
        if not 1 < chance < 2:  # else the text alone
            row.image(before, "clean", "vit")
        if chance > 1:  # else the images alone
            row.text(edit.text)
        return row.image(after, "noisy")

    def ask(self, rng: Random, edit: Edit, before: int) -> Row:
        if rng.random() < 0.03:
            questions = rng.choice(tuple(texts.CHAT))
            return (
                Row(self.tokenizer)
                .text(texts.style(rng.choice(questions), rng))
                .text(texts.CHAT[questions], learn=True)
            )
        question = texts.sample_question(rng, edit.before)
        return Row(self.tokenizer).image(before, "vit").text(question.text).text(question.answer, learn=True)

    def think(self, rng: Random, edit: Edit, before: int, after: int) -> Row:
        kind, chance = rng.choice(("draw", "draw", "edit", "edit", "ask")), rng.random() / DROPPED
        if kind == "ask":
            question = texts.sample_question(rng, edit.before)
            row = Row(self.tokenizer).text(THINK_TEXT).image(before, "vit").text(question.text)
            return row.text(texts.think_answer(question), learn=True)
        row = Row(self.tokenizer).text(THINK_IMAGE)
        if kind == "edit" and not 1 < chance < 2:
            row.image(before, "clean", "vit")
        if chance > 1:
            row.text(edit.text if kind == "edit" else texts.sample_prompt(rng, edit.after)[0])
        if chance > 2:
            row.text(texts.think_edit(edit) if kind == "edit" else texts.think_draw(edit.after), learn=True)
        return row.image(after, "noisy")


def stack(scenes: Iterable[Scene]) -> Tensor:
    """Scenes, drawn: bytes [scenes, side, side, 3]."""
    return torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
