"""What the server answers, for the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field

from bagel_opt.serve.chat_bodies import ImagePart, Part


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


ERRORS: dict = {"4XX": {"model": Error}, "5XX": {"model": Error}}


class Picture(BaseModel):
    """With b64_json or url, as was asked for."""

    b64_json: str | None = None
    url: str | None = Field(None, description="On this server, for an hour.")
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


class ResponsesAnswer(BaseModel):
    """output: items of type message, or image_generation_call after the reasoning if there is a thought. Streams send
    response.* events instead."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: dict | None
    output: list[dict]
    usage: dict


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
