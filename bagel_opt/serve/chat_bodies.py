"""The body of /v1/chat/completions: OpenAI's fields, and BAGEL's options beside them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from bagel_opt.serve.fields import IGNORED, PARTS, TEXT_LIMIT, Body, Drawing, Fields, Interleaving


class TextPart(Fields):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str = Field(max_length=TEXT_LIMIT)


class ImageUrl(Fields):
    model_config = ConfigDict(extra="ignore")

    url: str = Field(description="A data URL; with --remote-images also an http(s) address.")
    detail: Literal["auto", "low", "high", "original"] | None = IGNORED


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Fields):
    model_config = ConfigDict(extra="ignore")

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object, json_schema_input_type=ImageUrl | str)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Fields):
    """A turn. BAGEL has no roles: what was said is read in order, whoever said it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=TEXT_LIMIT)] | Annotated[list[Part], Field(max_length=PARTS)] | None = None
    images: list[ImagePart] | None = Field(None, max_length=PARTS, description="Pictures of an earlier answer.")
    id: str | None = IGNORED
    name: str | None = IGNORED
    reasoning_content: str | None = Field(None, description="A thought of an earlier answer; ignored.")
    refusal: None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[None] | None = Field(None, max_length=0)


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Fields):
    type: Literal["text"]


class Writing(Body):
    """What chats and responses have in common."""

    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    parallel_tool_calls: bool | None = IGNORED
    top_logprobs: Literal[0] | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=16, description="Ignored.")
    service_tier: str | None = IGNORED

    def check_sampling(self) -> None:
        if self.temperature is not None and (self.do_sample is not None or self.text_temperature is not None):
            raise ValueError("temperature: give temperature, or do_sample and text_temperature, not both")

    def text_options(self) -> dict:
        options = super().text_options()
        if self.temperature is not None:
            options["do_sample"] = self.temperature > 0
            if self.temperature > 0:
                options["text_temperature"] = max(self.temperature, 1e-3)
        return options


class ChatBody(Writing, Drawing, Interleaving):
    messages: list[Message] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "image"]] | None = Field(
        None, min_length=1, max_length=2, description='["image"] draws; its pictures come in message.images.'
    )
    output: Literal["interleaved"] | None = Field(
        None, description="Answers in texts and pictures, in turn, which are parts of message.content."
    )
    picture_parts: bool = Field(
        False,
        description="Pictures come as parts of content, for clients that drop message.images; in a stream, of delta.content.",
    )
    n: Literal[1] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 2)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 2)
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    tools: list[None] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = IGNORED
    functions: list[None] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = IGNORED
    response_format: TextFormat | None = None
    reasoning_effort: str | None = IGNORED
    verbosity: str | None = IGNORED
    store: Literal[False] | None = None

    @property
    def kind(self) -> str:
        """The output of BAGEL's that is asked for."""
        return self.output or ("image" if "image" in (self.modalities or ()) else "text")

    @property
    def longest(self) -> int | None:
        """Tokens that were allowed; the answer may be shorter where there is no room for so many."""
        return self.max_completion_tokens or self.max_tokens

    def spelled(self) -> dict[str, str]:
        return super().spelled() if self.output else {**super().spelled(), "output": "modalities"}

    @model_validator(mode="after")
    def check(self) -> "ChatBody":
        lengths = [name for name in ("max_tokens", "max_completion_tokens", "max_think_tokens") if getattr(self, name)]
        if len(lengths) > 1:
            raise ValueError(f"{lengths[0]}: given beside {lengths[1]}; give one of them")
        self.check_sampling()
        if self.output and self.modalities:
            raise ValueError("modalities: give output or modalities, not both")
        if self.kind == "text" and (given := self.drawing_options()):
            raise ValueError(f'{min(given)}: only with modalities ["image"] or output "interleaved"')
        if self.kind == "text" and self.picture_parts:
            raise ValueError('picture_parts: only with modalities ["image"] or output "interleaved"')
        if not self.output and (given := self.interleaving_options()):
            raise ValueError(f'{min(given)}: only with output "interleaved"')
        self.check_sides()
        return self
