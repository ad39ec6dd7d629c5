"""What the data of server-sent events holds, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Progress(BaseModel):
    """A flow step was made."""

    type: Literal["image_generation.progress", "image_edit.progress"]
    index: int
    total: int


class Thought(BaseModel):
    """More of the thought."""

    type: Literal["image_generation.thought", "image_edit.thought"]
    delta: str


class About(BaseModel):
    """What pictures have in common."""

    b64_json: str
    created_at: int
    size: str
    quality: str
    background: str
    output_format: str


class PartialImage(About):
    """What the picture would be if the flow went on straight."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class Completed(About):
    """The picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    seed: int
    thought: str | None = None
    usage: dict[str, Any]


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, Any]
    logprobs: None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """The role, then what is added to the content, then the reason of the end. After the last one comes [DONE].

    progress: of an interleaved answer, a flow step that was made."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    progress: dict[Literal["round", "index", "total"], int] | None = None
    usage: dict[str, int] | None = None


class Failure(BaseModel):
    """The last event of a request that failed on its way."""

    error: dict[str, Any]


class ResponseEvent(BaseModel):
    """As OpenAI's: response.created, .in_progress, .output_item.added, what is added to it, .output_item.done, and
    .completed or .incomplete with all of the response."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


IMAGE_EVENTS = (Progress, Thought, PartialImage, Completed, Failure)
CHAT_EVENTS = (ChatChunk, Failure)
RESPONSE_EVENTS = (ResponseEvent, Failure)


def documented(*events: type[BaseModel]) -> dict:
    """`responses` of a route that also streams these. The schema is that of one event, as in OpenAPI 3.2."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_inline(event) for event in events]},
    }
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}}
    described = event | {"description": "One event, with stream: true."}
    return {200: {"content": {"text/event-stream": {"schema": described}}}}


def _inline(event: type[BaseModel]) -> dict:
    """The schema without references, which would not be found from within another document."""
    schema = event.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(parts[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    return resolved(schema)
