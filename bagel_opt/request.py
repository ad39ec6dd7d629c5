"""What a user asks for: inputs and options, checked before anything runs."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from PIL import Image

from bagel_opt.images import InputImage, check_image, open_picture
from bagel_opt.option_kinds import check_text
from bagel_opt.options import SIZE, Options, described
from bagel_opt.videos import Video, read_video

Picture = Image.Image | os.PathLike | bytes  # the last two: a file's path, and what is in one
ALLOWED = "str for texts, and for pictures PIL.Image.Image, pathlib.Path and bytes"


class Request:
    """Texts and pictures in order, with options. A str is a text; a picture is a PIL image, a `Path` or a file's bytes, or has
    been read already (sampling.pictures.read_image), so that it need not be held as large as it came. video: frames as PIL
    images, a file's path or its bytes, read after the inputs; of models that read videos.

    Raises ValueError for bad options, an empty list, too thin an image and files that are none, FileNotFoundError for one
    that is not there, TypeError for other inputs.
    """

    def __init__(
        self, inputs: "str | Picture | Sequence[str | Picture | InputImage]" = (), *, video: Any = None, **options: Any
    ):
        one = isinstance(inputs, str | Picture)
        if not one and (not isinstance(inputs, Iterable) or isinstance(inputs, Set | Mapping)):  # which have no order
            raise TypeError(f"inputs is {type(inputs).__name__}; allowed are {ALLOWED}, and lists of them")
        self.inputs = [inputs] if one else list(inputs)
        self.given = options
        self.options = Options.make(options)
        if video is not None:
            self.inputs.append(read_video(video, self.options.fps))
        if not self.inputs:
            raise ValueError("inputs is empty; give at least one text or picture")
        for index, item in enumerate(self.inputs):
            where = f"inputs[{index}]"
            if isinstance(item, os.PathLike | bytes):
                self.inputs[index] = item = open_picture(item, where)
            if isinstance(item, Image.Image):
                check_image(item, where)
            elif isinstance(item, str):
                check_text(item, where)
            elif not isinstance(item, InputImage | Video):
                raise TypeError(f"{where} is {type(item).__name__}; allowed are {ALLOWED}")

    def options_over(self, recommended: Mapping[str, Any]) -> Options:
        """The options, where none was given those that a model recommends. Of sizes it recommends height and width for
        pictures without an input image, and size for those with one, but for pictures that come in turn with texts."""
        reads = any(not isinstance(item, str) for item in self.inputs)
        foreign = {name for name in described(SIZE) if (name == "size") != reads}
        if self.options.output == "interleaved":
            foreign.add("size")
        fitting = {name: value for name, value in recommended.items() if name not in foreign}
        return Options.make({**fitting, **self.given}) if fitting else self.options
