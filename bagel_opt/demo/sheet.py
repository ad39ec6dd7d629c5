"""Contact sheets: pictures in rows, with what was asked and answered below each."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from bagel_opt.demo.world import SIDE

GAP, LINE, FONT = 12, 15, 12  # pixels
PAPER, INK, FRAME = (255, 255, 255), (40, 40, 40), (205, 205, 205)


@dataclass(frozen=True)
class Cell:
    """A picture, or none, and the text below it."""

    picture: Image.Image | None
    text: str = ""


def sheet(rows: dict[str, list[Cell]]) -> Image.Image:
    """Lays out rows of cells, each under its heading; an empty heading takes no room."""
    font, bold = ImageFont.load_default(FONT), ImageFont.load_default(FONT + 3)
    columns = max(map(len, rows.values()))
    wrapped = [[textwrap.wrap(cell.text, SIDE // 6) for cell in row] for row in rows.values()]
    sides = [SIDE if any(cell.picture for cell in row) else -3 for row in rows.values()]
    heights = [
        (LINE + 8 if heading.strip() else 0) + side + 3 + LINE * max(map(len, lines)) + GAP
        for heading, side, lines in zip(rows, sides, wrapped, strict=True)
    ]
    page = Image.new("RGB", (GAP + columns * (SIDE + GAP), sum(heights) + 2 * GAP), PAPER)
    pen, top = ImageDraw.Draw(page), GAP
    for (heading, row), side, lines, height in zip(rows.items(), sides, wrapped, heights, strict=True):
        y = top
        if heading.strip():
            pen.text((GAP, y), heading, INK, bold)
            y += LINE + 8
        for column, cell in enumerate(row):
            x = GAP + column * (SIDE + GAP)
            if cell.picture:
                page.paste(cell.picture, (x, y))
                pen.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
            pen.multiline_text((x, y + side + 3), "\n".join(lines[column]), INK, font, spacing=3)
        top += height
    return page
