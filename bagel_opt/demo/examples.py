"""The examples of the model that ships: prompts, and a picture to edit and to ask about."""

import json
from pathlib import Path

from bagel_opt.demo.world import Scene, Thing, draw
from bagel_opt.examples import EXAMPLES
from bagel_opt.files.replacing import replacing, save_picture

PICTURE = "example.png"
SCENE = Scene(  # what the picture shows
    (
        Thing("circle", "red", "large", "left"),
        Thing("star", "blue", "large", "top right"),
        Thing("square", "green", "small", "bottom right"),
    ),
    "sky blue",
)
TOLD = {
    "prompts": [
        "a large red circle in the center on a white background",
        "a small blue star at the top left and a large green ring at the bottom right on a cream background",
        "a large yellow star at the top, a small purple square on the left and a large orange triangle at the bottom right on a black background",
    ],
    "picture": PICTURE,
    "edit": "make the star yellow",
    "question": "what is in the image?",
}


def write_examples(folder: Path) -> None:
    """Writes them into a checkpoint's folder."""
    save_picture(draw(SCENE), folder / PICTURE)
    with replacing(folder / EXAMPLES) as partial:
        partial.write_text(json.dumps(TOLD, indent=1) + "\n", encoding="utf-8")
