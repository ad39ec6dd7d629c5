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


class VideoError(BaseModel):
    code: str
    message: str


class VideoAnswer(BaseModel):
    """A video and how far it is. seconds: from the first frame to the last. expires_at: when it is forgotten, at the latest."""

    id: str
    object: Literal["video"]
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="Per cent: of flow steps and of the parts that are decoded.")
    error: VideoError | None
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    prompt: str
    size: str
    seconds: str
    num_frames: int
    fps: float
    seed: int
    remixed_from_video_id: None


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[VideoAnswer]
    has_more: bool
    first_id: str | None
    last_id: str | None


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "bagel_opt"
    default_size: int = Field(description="Side in pixels of a picture whose size is not asked for.")
    size_multiple: int = Field(description="Sides are multiples of it.")
    adapters: list[str] = Field(description="Adapters that a request may ask for.")
    draws: list[Literal["image", "video", "interleaved"]] = Field(description="What it draws.")
    thinks: bool = Field(description="Whether it can think first.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
