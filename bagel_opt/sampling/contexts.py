"""What each guidance branch of a request reads, as blocks: the inputs walked as the official code walks them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagel_opt.images import InputImage
from bagel_opt.options import Options
from bagel_opt.sampling.flow import FlowStep


@dataclass(frozen=True)
class Block:
    """A text (its ids with start and end), or the VAE or ViT block of image number `image`.

    start: its first position, where that is not the one after what comes before.
    """

    kind: str  # "text", "vae" or "vit"
    length: int  # slots that it takes, markers included
    ids: tuple[int, ...] = ()
    image: int = -1
    start: int | None = None

    @property
    def tokens(self) -> int:
        """Of what a profile counts: all of a text, of an image those between its markers."""
        return self.length - (0 if self.kind == "text" else 2)

    @property
    def room(self) -> int:
        """What a profile has to have of them."""
        return self.tokens

    @property
    def positions(self) -> int:
        """How many it takes: an image block shares one."""
        return self.length if self.kind == "text" else 1

    def placed(self, position: int, tokens: int) -> np.ndarray:
        """Of an image block that begins at this position: what programs take, for so many tokens."""
        return np.array(position)


DRAWN = Block("vae", 0)  # what is to be drawn


Item = Block | int  # a text, or an image's number


def image_blocks(number: int, image: InputImage, draws: bool) -> list[Block]:
    """An image as it is read: for a picture to be drawn with its latents, and always with its ViT tokens."""
    (height, width), (rows, columns) = image.vae_grid, image.vit_grid
    vae = [Block("vae", height * width + 2, image=number)] if draws else []
    return [*vae, Block("vit", rows * columns + 2, image=number)]


def contexts(
    opening: Sequence[Block],
    items: Sequence[Item],
    images: Sequence[InputImage],
    draws: bool,
    negative: Block | None = None,
) -> tuple[list[Block], list[Block], list[Block]]:
    """The contexts main, cfg_text and cfg_img. opening: what comes before the items; negative: what takes the last text's
    place in cfg_text."""
    main, cfg_text, cfg_img = list(opening), [], list(opening)
    last_text: Block | None = None
    for item in items:
        if isinstance(item, Block):
            last_text = item
            cfg_text = list(main)
            main.append(item)
            cfg_img.append(item)
        else:
            main += image_blocks(item, images[item], draws)
            cfg_text = list(main)
    if negative is not None:
        place = next((i for i in reversed(range(len(main))) if main[i] is last_text), len(main))
        cfg_text = [*main[:place], negative, *main[place + 1 :]]
    return main, cfg_text, cfg_img


def evaluated(options: Options, steps: Sequence[FlowStep]) -> tuple[bool, bool]:
    """Whether cfg_text and cfg_img are evaluated in any of the steps."""
    text = options.cfg_text_scale > 1 and any(step.guided for step in steps)
    return text, text and options.cfg_img_scale > 1
