"""The body of /v1/responses: OpenAI's fields, and BAGEL's options beside them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from bagel_opt.serve.chat_bodies import StreamOptions, TextFormat, Writing
from bagel_opt.serve.fields import ABOUT_SIZES, IGNORED, OWN_SIZES, PARTS, SIZES, TEXT_LIMIT, Drawing, Fields, read_size

Words = Annotated[str, Field(max_length=TEXT_LIMIT)]


class Lax(Fields):
    """What earlier answers are made of has fields that nobody needs again."""

    model_config = ConfigDict(extra="ignore")


class TextInput(Lax):
    type: Literal["input_text", "output_text"]
    text: Words


class ImageInput(Lax):
    type: Literal["input_image"]
    image_url: str = Field(description="A data URL; with --remote-images also an http(s) address.")
    detail: Literal["auto", "low", "high", "original"] | None = IGNORED


InputPart = Annotated[TextInput | ImageInput, Field(discriminator="type")]


class Turn(Lax):
    """BAGEL has no roles: what was said is read in order, whoever said it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[InputPart], Field(max_length=PARTS)]


class Drawn(Lax):
    """A picture of an earlier answer."""

    type: Literal["image_generation_call"]
    result: str = Field(description="In base64.")


class Thought(Lax):
    """A thought of an earlier answer; ignored."""

    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    return item.get("type") or "message" if isinstance(item, dict) else getattr(item, "type", "message")


Item = Annotated[
    Annotated[Turn, Tag("message")]
    | Annotated[Drawn, Tag("image_generation_call")]
    | Annotated[Thought, Tag("reasoning")],
    Discriminator(_kind),
]


class ImageTool(Fields):
    type: Literal["image_generation"]
    size: str | None = Field(None, pattern=SIZES, description=ABOUT_SIZES)
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    partial_images: int = Field(0, ge=0, le=3)
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    action: Literal["auto", "generate", "edit"] | None = IGNORED
    model: str | None = IGNORED
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max"] | None = IGNORED
    moderation: Literal["auto", "low"] | None = IGNORED
    input_fidelity: Literal["low", "high"] | None = IGNORED


class ToolChoice(Fields):
    type: Literal["image_generation"]


class TextConfig(Fields):
    format: TextFormat | None = None
    verbosity: str | None = IGNORED


class ResponsesBody(Writing, Drawing):
    input: Words | Annotated[list[Item], Field(min_length=1, max_length=256)]
    instructions: Words | None = Field(None, description="What is read first.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 2)
    tools: list[ImageTool] = Field([], max_length=1, description="With image_generation the answer is a picture.")
    tool_choice: Literal["auto", "required", "none"] | ToolChoice = "auto"
    text: TextConfig | None = None
    stream_options: StreamOptions | None = None
    background: Literal[False] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = IGNORED
    max_tool_calls: int | None = IGNORED
    reasoning: dict[str, Any] | None = IGNORED
    store: bool | None = Field(None, description="Nothing is kept.")
    truncation: Literal["auto", "disabled"] | None = IGNORED

    @property
    def tool(self) -> ImageTool | None:
        """What the picture is drawn with, where one is asked for."""
        return self.tools[0] if self.tools and self.tool_choice != "none" else None

    def spelled(self) -> dict[str, str]:
        sized = self.tool and read_size(self.tool.size)
        sides = dict.fromkeys(("width", "height"), "tools.0.size") if sized else {}
        return {**super().spelled(), **sides, "output": "tools"}

    @model_validator(mode="after")
    def check(self) -> "ResponsesBody":
        if self.max_output_tokens and self.max_think_tokens:
            raise ValueError("max_output_tokens: given beside max_think_tokens; give one of them")
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise ValueError('tool_choice: there are no tools; allowed with it: [{"type": "image_generation"}]')
        self.check_sampling()
        if self.tool is None and (given := self.drawing_options()):
            raise ValueError(f"{min(given)}: only with the tool image_generation")
        if self.tool and (sides := read_size(self.tool.size)):
            if self.height or self.width:
                raise ValueError("tools.0.size: give size, or height and width, not both")
            self.width, self.height = sides
        elif self.tool and self.tool.size in OWN_SIZES:
            self.size = self.tool.size
        self.check_sides()
        return self
