"""What a user asks for: inputs and options, checked before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from bagel_opt.images import InputImage, check_image
from bagel_opt.options import Options, check_text


class Request:
    """Texts and PIL images in order, with options. An image may have been read already (sampling.pictures.read_image), so
    that it need not be held as large as it came.

    Raises ValueError for bad options, an empty list and too thin an image, TypeError for other inputs.
    """

    def __init__(self, inputs: "str | Image.Image | Sequence[str | Image.Image | InputImage]", **options: Any):
        if not isinstance(inputs, str | Image.Image | Iterable):
            raise TypeError(f"inputs is {type(inputs).__name__}; allowed are str, PIL.Image.Image and lists of them")
        self.inputs = [inputs] if isinstance(inputs, str | Image.Image) else list(inputs)
        if not self.inputs:
            raise ValueError("inputs is empty; give at least one text or PIL image")
        for index, item in enumerate(self.inputs):
            if isinstance(item, Image.Image):
                check_image(item, f"inputs[{index}]")
            elif isinstance(item, InputImage):
                continue
            elif not isinstance(item, str):
                raise TypeError(f"inputs[{index}] is {type(item).__name__}; allowed are str and PIL.Image.Image")
            else:
                check_text(item, f"inputs[{index}]")
        self.given = options
        self.options = Options.make(options)

    def options_over(self, recommended: Mapping[str, Any]) -> Options:
        """The options, where none was given those that a model recommends."""
        return Options.make({**recommended, **self.given}) if recommended else self.options
