"""/v1/chat/completions: texts and pictures in; a text, a picture, or texts and pictures in turn out."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.requests import Request as HttpRequest

from bagel_opt.images import InputImage
from bagel_opt.options import DEFAULT_ROUNDS
from bagel_opt.request import Request
from bagel_opt.serve.bodies import documented_body, json_body
from bagel_opt.serve.engine_thread import Step, Ticket
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.events import CHAT_EVENTS, documented
from bagel_opt.serve.schemas import ERRORS, PARTS, TEXT_LIMIT, ChatBody, ChatResponse, ImagePart, TextPart
from bagel_opt.serve.service import Injected, Service, Source, input_tokens
from bagel_opt.serve.streams import EventStream, TextStream, encoded, sse

router = APIRouter(prefix="/v1/chat", responses=ERRORS)


@router.post(
    "/completions",
    response_model=ChatResponse,
    responses=documented(*CHAT_EVENTS),
    openapi_extra=documented_body(ChatBody),
)
async def completions(http: HttpRequest, service: Injected, body: Annotated[ChatBody, json_body(ChatBody)]) -> Response:
    """Answers, or with modalities ["image"] draws: the picture is a data URL in message.images. With output "interleaved"
    texts and pictures are the parts of message.content."""
    service.check_model(body.model)
    parts = _parts(body)
    images = sum(isinstance(part, ImagePart) for part, _ in parts)
    options, defaults = body.drawing_options() | body.text_options(), service.engine.model.defaults
    timesteps = 0 if body.kind == "text" else body.num_timesteps or defaults.num_timesteps
    if body.output and body.max_rounds is None and (defaults.max_rounds or DEFAULT_ROUNDS) > service.limits.pictures:
        options["max_rounds"] = service.limits.pictures
    options |= body.interleaving_options()
    service.limits.check(body.max_rounds or 1, timesteps, images, image="messages", drawn="max_rounds")
    sources = [
        _source(part, service, where, http.state.pictures) for part, where in parts if isinstance(part, ImagePart)
    ]
    texts = [part.text if isinstance(part, TextPart) else None for part, _ in parts]
    http.state.pictures.clear()
    options["seed"] = secrets.randbits(32) if body.seed is None else body.seed

    def make(pictures: list[InputImage]) -> list[Request]:
        coming = iter(pictures)
        items = [next(coming) if text is None else text for text in texts]
        return [Request(items, output=body.kind, **options)]

    progress = body.stream and bool(body.output)
    [ticket] = await service.submit(http, sources, make, 1, f"chat_{body.kind}", body.reading_options(), progress)
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        return EventStream(service, ticket, _events(service, body, ticket, about))
    [outputs] = await service.results(http, [ticket])
    message = {"role": "assistant", "refusal": None, **await _message(body, outputs)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(ticket)}
    return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": _usage(ticket)})


async def _events(service: Service, body: ChatBody, ticket: Ticket, about: dict) -> AsyncIterator[str]:
    usage = body.stream_options is not None and body.stream_options.include_usage

    def chunk(delta: dict, reason: str | None = None, **extra: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        extra |= {"usage": None} if usage else {}
        return sse({**about, "object": "chat.completion.chunk", "choices": [choice], **extra})

    stops = () if body.output else ticket.plan.options.stops
    yield chunk({"role": "assistant", "content": ""})
    text = TextStream(service.engine.model.tokenizer, stops)
    field = "reasoning_content" if body.kind == "image" else "content"
    async for event in ticket:
        if isinstance(event, int):
            if delta := text.push(event):
                yield chunk({field: delta})
        elif isinstance(event, Step):
            yield chunk({}, progress={"round": event.round, "index": event.index, "total": event.total})
        elif isinstance(event.output, str):
            if rest := text.until(event.output):
                yield chunk({"content": rest})
            text = TextStream(service.engine.model.tokenizer)
        else:
            yield chunk({"images": [await _image(event.output)]})
    if not body.output:
        if isinstance(ticket.outputs[0], str) and (rest := text.until(ticket.outputs[0])):
            yield chunk({field: rest})
        if body.kind == "image":
            yield chunk({"images": [await _image(ticket.outputs[-1])]})
    yield chunk({}, _reason(ticket))
    if usage:
        yield sse({**about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(ticket)})
    yield "data: [DONE]\n\n"


def _parts(body: ChatBody) -> list[tuple[TextPart | ImagePart, str]]:
    """What was said, in order, each with its place. Where a message has one text, its pictures come before it, as the
    official code feeds them."""
    found: list[tuple[TextPart | ImagePart, str]] = []
    for index, message in enumerate(body.messages):
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        parts = [*(parts or []), *(message.images or [])]
        if sum(isinstance(part, TextPart) for part in parts) == 1:
            parts.sort(key=lambda part: isinstance(part, TextPart))
        found += [(part, f"messages.{index}") for part in parts]
    if not found:
        raise ApiError(400, "messages: nothing was said", "messages")
    if len(found) > PARTS or sum(len(p.text) for p, _ in found if isinstance(p, TextPart)) > TEXT_LIMIT:
        raise ApiError(400, f"messages: more than {PARTS} parts or {TEXT_LIMIT} characters", "messages")
    return found


def _source(part: ImagePart, service: Service, param: str, pictures: Mapping[str, memoryview]) -> Source:
    """A picture in a data URL or, where that is allowed, at an address."""
    url = part.image_url.url
    if url in pictures or url[:5].lower() == "data:" or not service.remote:
        return Source(param, pictures.get(url, url.encode()), data_url=True)
    return Source(param, address=url)


async def _message(body: ChatBody, outputs: list[str | Image.Image]) -> dict:
    if body.output:
        texts = ({"type": "text", "text": output} if isinstance(output, str) else None for output in outputs)
        parts = [text or await _image(output) for text, output in zip(texts, outputs, strict=True)]
        return {"content": parts}
    *thought, last = outputs
    if isinstance(last, str):
        return {"content": last}
    return {"content": None, "images": [await _image(last)]} | ({"reasoning_content": thought[0]} if thought else {})


async def _image(picture: Image.Image) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{await encoded(picture)}"}}


def _reason(ticket: Ticket) -> str:
    """ "length" where a text was cut, or where no more rounds were allowed."""
    written = len(ticket.tokens) - ticket.parted[-2 if len(ticket.parted) > 1 else -1]
    cut = isinstance(ticket.outputs[-1], str) and written == ticket.plan.max_tokens - 1
    unfinished = ticket.plan.options.output == "interleaved" and not isinstance(ticket.outputs[-1], str)
    return "length" if cut or unfinished else "stop"


def _usage(ticket: Ticket) -> dict:
    prompt, side = sum(input_tokens(ticket.plan)), ticket.engine.config.token_pixels
    pictures = [output for output in ticket.outputs if not isinstance(output, str)]
    grids = [ticket.plan.grid] if ticket.plan.resized else [(p.height // side, p.width // side) for p in pictures]
    written = len(ticket.tokens) + sum(rows * columns for rows, columns in grids)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
