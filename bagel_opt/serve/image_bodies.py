"""Bodies of /v1/images: OpenAI's fields, and BAGEL's options beside them."""

from typing import Literal

from pydantic import Field, model_validator

from bagel_opt.serve.fields import ABOUT_SIZES, IGNORED, PARTS, SIZES, TEXT_LIMIT, Body, Drawing, Fields, read_size


class ImageBody(Body, Drawing):
    prompt: str = Field(min_length=1, max_length=TEXT_LIMIT)
    n: int = Field(1, ge=1, description="Pictures; they take seed, seed + 1, ...")
    size: str | None = Field(None, pattern=SIZES, description=ABOUT_SIZES)
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json, the default, or an address on this server that holds for an hour."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = IGNORED
    style: Literal["vivid", "natural"] | None = IGNORED
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = IGNORED

    @model_validator(mode="after")
    def check(self) -> "ImageBody":
        if sides := read_size(self.size):
            if self.height or self.width:
                raise ValueError("size: give size, or height and width, not both")
            self.width, self.height = sides
        self.check_sides()
        if self.stream and self.n > 1:
            raise ValueError("n: a stream has one picture")
        if self.stream and self.response_format == "url":
            raise ValueError("response_format: a stream has b64_json")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images: needs stream=true")
        return self

    def spelled(self) -> dict[str, str]:
        sides = {} if read_size(self.size) is None else dict.fromkeys(("width", "height"), "size")
        return {**super().spelled(), **sides, "output": "model"}  # what it does not draw, no field asks for


class EditBody(ImageBody):
    input_fidelity: Literal["low", "high"] | None = IGNORED


class Reference(Fields):
    image_url: str = Field(description="A data URL; with --remote-images also an http(s) address.")


class JsonEditBody(EditBody):
    """An edit without files."""

    images: list[Reference] = Field(min_length=1, max_length=PARTS)
