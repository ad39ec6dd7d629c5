"""Bodies of requests: OpenAI's fields, and BAGEL's own options beside them under their official names.

Fields without an effect here are taken where they change nothing that was asked for; any other unknown one is refused.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from bagel_opt.option_kinds import Choice, Flag, Interval, Kind, Number, Scales, Text, Texts
from bagel_opt.options import ADAPTERS, EVERY, INPUTS, INTERLEAVING, PICTURE, READING, SIZE, Option, described

TEXT_LIMIT = 32_000  # characters of one text, as at OpenAI; the profile's slots are the tighter limit
PARTS = 64  # texts and pictures of one request
WHOLE_LIMIT = 2**31  # of whole numbers that have no other
SIZES = described(SIZE)["size"].kind.values  # beside those in numbers
OTHER_NAMES = {"adapters": ("lora",)}  # of fields, as other servers call them


def _type(kind: Kind) -> Any:
    """What pydantic checks a value of an option with."""
    match kind:
        case Number(low, None, whole=True):
            return Annotated[int, Field(ge=low, le=WHOLE_LIMIT)]
        case Number(low, high, whole=True):  # not le: the document's numbers are floats, and 2**63 - 1 is none
            return Annotated[int, Field(ge=low, lt=high + 1)]
        case Number(low, high):
            return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]
        case Interval(low, high):
            return tuple[(_type(Number(low, high)),) * 2]
        case Choice(values):
            return Literal[values]
        case Flag():
            return bool
        case Text():
            return Annotated[str, Field(max_length=TEXT_LIMIT)]
        case Texts(most, longest):
            text = Annotated[str, Field(min_length=1, max_length=longest)]
            return text | Annotated[list[text], Field(max_length=most)]
        case Scales(low, high):
            return Annotated[dict[str, _type(Number(low, high))], Field(max_length=PARTS), BeforeValidator(_from_form)]


def _from_form(value: Any) -> Any:
    """Forms have texts alone, in which objects are JSON."""
    return pydantic_core.from_json(value) if isinstance(value, str) else value


def _field(option: Option) -> tuple[Any, Any]:
    default = option.unset if option.default is None else json.dumps(option.default)
    names = AliasChoices(option.name, *OTHER_NAMES.get(option.name, ()))
    about = f"{option.sentence} Default: {default}."
    return _type(option.kind) | None, Field(None, description=about, validation_alias=names)


def _model(name: str, *groups: str) -> type[BaseModel]:
    """A body's fields of BAGEL's own options. Where one is absent or null, its default counts."""
    return create_model(name, **{option.name: _field(option) for option in described(*groups).values()})


class Body(_model("RequestOptions", EVERY, READING, ADAPTERS)):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="The name that /v1/models gives; may be left out.")
    user: str | None = Field(None, description="Ignored.")

    def text_options(self) -> dict:
        """What was given of the options of every request, but for the seed, which a server draws where none is."""
        return self._given(described(EVERY, ADAPTERS).keys() - {"seed"}) | self.reading_options()

    def reading_options(self) -> dict:
        """What was given of the options on how pictures go in."""
        return self._given(described(READING))

    def _given(self, names: Iterable[str]) -> dict:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Drawing(_model("PictureOptions", PICTURE, SIZE, INPUTS)):
    """BAGEL's options of a picture."""

    def drawing_options(self) -> dict:
        return {name: value for name in Drawing.model_fields if (value := getattr(self, name)) is not None}


class Interleaving(_model("InterleavedOptions", INTERLEAVING)):
    """BAGEL's options of texts and pictures in turn."""

    def interleaving_options(self) -> dict:
        return {name: value for name in Interleaving.model_fields if (value := getattr(self, name)) is not None}


class ImageBody(Body, Drawing):
    prompt: str = Field(min_length=1, max_length=TEXT_LIMIT)
    n: int = Field(1, ge=1, description="Pictures; they take seed, seed + 1, ...")
    size: str | None = Field(
        None,
        pattern=rf"^(auto|{'|'.join(SIZES)}|[0-9]{{1,5}}x[0-9]{{1,5}})$",
        description=f'"WIDTHxHEIGHT", "auto" or an option: {described(SIZE)["size"].help}.',
    )
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(None, description="Ignored.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Ignored.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Ignored.")

    @model_validator(mode="after")
    def check(self) -> "ImageBody":
        if self.size not in (None, "auto", *SIZES):
            if self.height or self.width:
                raise ValueError("give size, or height and width, not both")
            self.width, self.height = map(int, self.size.split("x"))
        self.size = self.size if self.size in SIZES else None
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together")
        if self.stream and self.n > 1:
            raise ValueError("a stream has one picture: n=1")
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream=true")
        return self


class EditBody(ImageBody):
    input_fidelity: Literal["low", "high"] | None = Field(None, description="Ignored.")


class TextPart(BaseModel):
    type: Literal["text"]
    text: str = Field(max_length=TEXT_LIMIT)


class ImageUrl(BaseModel):
    url: str = Field(description="A data URL; with --remote-images also an http(s) address.")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """A turn. BAGEL has no roles: what was said is read in order, whoever said it."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=TEXT_LIMIT)] | Annotated[list[Part], Field(max_length=PARTS)] | None = None
    images: list[ImagePart] | None = Field(None, max_length=PARTS, description="Pictures of an earlier answer.")
    name: str | None = Field(None, description="Ignored.")
    reasoning_content: str | None = Field(None, description="A thought of an earlier answer; ignored.")
    refusal: None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[None] | None = Field(None, max_length=0)


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(BaseModel):
    type: Literal["text"]


class ChatBody(Body, Drawing, Interleaving):
    messages: list[Message] = Field(min_length=1, max_length=256)
    modalities: list[Literal["text", "image"]] | None = Field(
        None, min_length=1, max_length=2, description='["image"] draws; its pictures come in message.images.'
    )
    output: Literal["interleaved"] | None = Field(
        None, description="Answers in texts and pictures, in turn, which are parts of message.content."
    )
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 2)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 2)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    top_p: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    tools: list[None] | None = Field(None, max_length=0)
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = Field(None, max_length=16, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")

    @property
    def kind(self) -> str:
        """The output of BAGEL's that is asked for."""
        return self.output or ("image" if "image" in (self.modalities or ()) else "text")

    @model_validator(mode="after")
    def check(self) -> "ChatBody":
        lengths = {"max_tokens": self.max_tokens, "max_completion_tokens": self.max_completion_tokens}
        lengths |= {"max_think_tokens": self.max_think_tokens}
        if sum(value is not None for value in lengths.values()) > 1:
            raise ValueError(f"give one of {', '.join(lengths)}")
        if self.temperature is not None and (self.do_sample is not None or self.text_temperature is not None):
            raise ValueError("give temperature, or do_sample and text_temperature, not both")
        if self.output and self.modalities:
            raise ValueError("give output or modalities, not both")
        if self.kind == "text" and (given := self.drawing_options()):
            raise ValueError(f'{", ".join(given)}: only with modalities ["image"] or output "interleaved"')
        if not self.output and (given := self.interleaving_options()):
            raise ValueError(f'{", ".join(given)}: only with output "interleaved"')
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together")
        return self

    def text_options(self) -> dict:
        options = super().text_options()
        if (longest := self.max_completion_tokens or self.max_tokens) is not None:
            options["max_think_tokens"] = longest + 1  # which counts the start token too
        if self.temperature is not None:
            options["do_sample"] = self.temperature > 0
            if self.temperature > 0:
                options["text_temperature"] = max(self.temperature, 1e-3)
        return options


# ---- answers


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


ERRORS: dict = {"4XX": {"model": Error}, "5XX": {"model": Error}}


class Picture(BaseModel):
    b64_json: str
    seed: int
    thought: str | None = None


class ImagesResponse(BaseModel):
    """Streams send image_generation.* or image_edit.* events instead: progress, partial_image, completed."""

    created: int
    data: list[Picture]
    size: str
    quality: str
    background: str
    output_format: str
    usage: dict


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | list[Part] | None = Field(description="Parts where output is interleaved.")
    images: list[ImagePart] | None = None
    reasoning_content: str | None = Field(None, description="The thought before a picture.")
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """Streams send chat.completion.chunk events instead, then [DONE]."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: dict[str, int]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "bagel_opt"
    default_size: int = Field(description="Side in pixels of a picture whose size is not asked for.")
    size_multiple: int = Field(description="Sides are multiples of it.")
    adapters: list[str] = Field(description="Adapters that a request may ask for.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
