"""Shows the model that ships at work: python -m bagel_opt.demo --out FOLDER

Draws, edits what it drew and asks about the result; exports to ONNX and does the same from the bundle; leaves a contact
sheet of both side by side.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

import bagel_opt
from bagel_opt.cli.console import guarded
from bagel_opt.demo.sheet import Cell, sheet
from bagel_opt.export import export
from bagel_opt.files.replacing import save_picture

# A prompt, what to change in the picture, and what to ask about the outcome.
STORIES = (
    ("a large red circle in the center on a white background", "make it green", "what color is the circle?"),
    (
        "a small yellow star at the top left and a big blue ring on the right",
        "make the star bigger",
        "is the star large?",
    ),
    (
        "a purple triangle at the bottom on a black background",
        "add a small orange circle at the top",
        "what do you see?",
    ),
    (
        "a pink square on the left and a brown star on the right on cream",
        "swap the square and the star",
        "where is the star?",
    ),
    (
        "a green ring at the top, a red square on the left and a blue circle on the right",
        "remove the red square",
        "how many shapes are there?",
    ),
    ("an orange triangle in the upper right on gray", "make the background sky blue", "what color is the background?"),
)
THOUGHT = "a star and a ring"
OPTIONS = {"num_timesteps": 25, "seed": 0}


def perform(model: bagel_opt.Model) -> tuple[list[Image.Image], list[Image.Image], list[str], str, Image.Image]:
    """(drawn, edited, answers, thought, picture after the thought)"""
    requests = [bagel_opt.Request(prompt, **OPTIONS) for prompt, _, _ in STORIES]
    drawn = [outputs[0] for outputs in model.run_many(requests)]
    stories = list(zip(drawn, STORIES, strict=True))
    requests = [bagel_opt.Request([picture, change], **OPTIONS) for picture, (_, change, _) in stories]
    edited = [outputs[0] for outputs in model.run_many(requests)]
    answers = [model.understand(picture, story[2]) for picture, story in zip(edited, STORIES, strict=True)]
    thought, picture = model.run([THOUGHT], think=True, **OPTIONS)
    return drawn, edited, answers, thought, picture


def contact_sheet(eager: tuple, onnx: tuple) -> Image.Image:
    prompts, changes, questions = zip(*STORIES, strict=True)
    answers = [f"{q} {a}" if a == b else f"{q} {a} / {b}" for q, a, b in zip(questions, eager[2], onnx[2], strict=True)]

    def cells(pictures: list, texts: tuple | list) -> list[Cell]:
        return [Cell(picture, text) for picture, text in zip(pictures, texts, strict=True)]

    return sheet(
        {
            "Drawn: eager PyTorch": cells(eager[0], [""] * len(STORIES)),
            "Drawn: ONNX Runtime": cells(onnx[0], prompts),
            "Edited and asked: eager PyTorch": cells(eager[1], [""] * len(STORIES)),
            "Edited and asked: ONNX Runtime": cells(
                onnx[1], [f"{c}. {a}" for c, a in zip(changes, answers, strict=True)]
            ),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw, edit, answer; eagerly and from an ONNX bundle.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures and the bundle")
    parser.add_argument("--checkpoint", help="another model (default: the one that ships)")
    a = parser.parse_args()
    raise SystemExit(guarded(lambda: show(a)))


def show(a: argparse.Namespace) -> None:
    a.out.mkdir(parents=True, exist_ok=True)
    console, start = Console(highlight=False, soft_wrap=True), time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:4.0f} s  {text}")

    model = bagel_opt.load(a.checkpoint, device="cpu")
    say("loaded in eager PyTorch, float32 on the CPU")
    eager = perform(model)
    for (prompt, change, question), answer in zip(STORIES, eager[2], strict=True):
        say(f"{prompt!r}, then {change!r}: {question} {answer!r}")
    say(f"{THOUGHT!r} with think: {eager[3]}")
    bundle = export(a.checkpoint, a.out / "bundle", "demo")
    say(f"exported to {bundle}")
    onnx = perform(bagel_opt.load(bundle))
    pairs = zip((*eager[0], *eager[1], eager[4]), (*onnx[0], *onnx[1], onnx[4]), strict=True)
    off = max(int(np.abs(np.asarray(x).astype(int) - np.asarray(y)).max()) for x, y in pairs)
    say(f"the same from ONNX Runtime: pictures at most {off}/255 off, answers equal: {eager[2:4] == onnx[2:4]}")
    for number, (picture, change) in enumerate(zip(eager[0], eager[1], strict=True)):
        save_picture(picture, a.out / f"{number}-drawn.png")
        save_picture(change, a.out / f"{number}-edited.png")
    save_picture(contact_sheet(eager, onnx), a.out / "sheet.png")
    say(f"contact sheet: {(a.out / 'sheet.png').resolve()}")


if __name__ == "__main__":
    main()
