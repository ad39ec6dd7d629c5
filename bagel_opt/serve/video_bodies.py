"""The bodies of /v1/videos: OpenAI's fields, and the model's options beside them."""

from typing import Literal

from pydantic import Field, model_validator

from bagel_opt.options import FPS
from bagel_opt.serve.fields import ABOUT_SIZES, SIZES, TEXT_LIMIT, Body, Drawing, Fields, Filming, read_size
from bagel_opt.serve.image_bodies import Reference


class VideoBody(Body, Drawing, Filming):
    """input_reference: a picture that the video begins with, or a video that is edited."""

    prompt: str = Field(min_length=1, max_length=TEXT_LIMIT)
    size: str | None = Field(None, pattern=SIZES, description=ABOUT_SIZES)
    seconds: float | None = Field(
        None, gt=0, le=3600, description="From the first frame to the last; in place of num_frames."
    )
    input_reference: Reference | None = Field(None, description="In a form also a file, a picture or a video.")

    @model_validator(mode="after")
    def check(self) -> "VideoBody":
        if sides := read_size(self.size):
            if self.height or self.width:
                raise ValueError("size: give size, or height and width, not both")
            self.width, self.height = sides
        self.check_sides()
        if self.seconds is not None:
            if self.num_frames is not None:
                raise ValueError("seconds: give seconds, or num_frames, not both")
            self.num_frames = int(self.seconds * (self.fps or FPS)) + 1
        return self

    def spelled(self) -> dict[str, str]:
        sides = {} if read_size(self.size) is None else dict.fromkeys(("width", "height"), "size")
        length = {} if self.seconds is None else {"num_frames": "seconds"}
        return super().spelled() | sides | length


class Listing(Fields):
    """What of a list is asked for."""

    after: str | None = Field(None, max_length=256, description="The id before the first that is wanted.")
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = Field("desc", description="By when they were asked for.")


class Variant(Fields):
    variant: Literal["video"] = "video"
