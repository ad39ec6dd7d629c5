"""/v1/chat/completions: texts and pictures in; a text, a picture, or texts and pictures in turn out."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.requests import Request as HttpRequest

from bagel_opt.options import DEFAULT_ROUNDS
from bagel_opt.serve.answers import ERRORS, ChatResponse
from bagel_opt.serve.bodies import documented_body, json_body
from bagel_opt.serve.chat_bodies import ChatBody, ImagePart, TextPart
from bagel_opt.serve.engine_thread import Step, Ticket
from bagel_opt.serve.events import CHAT_EVENTS, documented
from bagel_opt.serve.said import Said, as_work, in_turn
from bagel_opt.serve.service import Injected, Service, token_counts, was_cut
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
    model = service.check_model(body.model)
    options, defaults = body.drawing_options() | body.text_options(), service.engine.model.defaults
    if body.output and body.max_rounds is None and (defaults.max_rounds or DEFAULT_ROUNDS) > service.limits.pictures:
        options["max_rounds"] = service.limits.pictures
    options |= body.interleaving_options()
    options["seed"] = secrets.randbits(32) if body.seed is None else body.seed
    work = as_work(http, service, _said(body), body.kind, options, body.reading_options())
    work.longest, work.spelled = body.longest, body.spelled()
    work.progress = body.stream and bool(body.output)
    [ticket] = await service.submit(http, work)
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
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
    pictures = "content" if body.picture_parts else "images"
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
            yield chunk({pictures: [await _image(event.output)]})
    if not body.output:
        if isinstance(ticket.outputs[0], str) and (rest := text.until(ticket.outputs[0])):
            yield chunk({field: rest})
        if body.kind == "image":
            yield chunk({pictures: [await _image(ticket.outputs[-1])]})
    yield chunk({}, _reason(ticket))
    if usage:
        yield sse({**about, "object": "chat.completion.chunk", "choices": [], "usage": _usage(ticket)})
    yield "data: [DONE]\n\n"


def _said(body: ChatBody) -> list[Said]:
    """All that was said, in order."""
    found = []
    for index, message in enumerate(body.messages):
        where = f"messages.{index}"
        if isinstance(message.content, str):
            parts = [Said(f"{where}.content", message.content)]
        else:
            parts = [_part(part, f"{where}.content.{place}") for place, part in enumerate(message.content or [])]
        parts += [_part(part, f"{where}.images.{place}") for place, part in enumerate(message.images or [])]
        found += in_turn(parts)
    return found


def _part(part: TextPart | ImagePart, where: str) -> Said:
    return (
        Said(f"{where}.text", part.text)
        if isinstance(part, TextPart)
        else Said(f"{where}.image_url", url=part.image_url.url)
    )


async def _message(body: ChatBody, outputs: list[str | Image.Image]) -> dict:
    if body.output:
        texts = ({"type": "text", "text": output} if isinstance(output, str) else None for output in outputs)
        parts = [text or await _image(output) for text, output in zip(texts, outputs, strict=True)]
        return {"content": parts}
    *thought, last = outputs
    if isinstance(last, str):
        return {"content": last}
    drawn = [await _image(last)]
    message = {"content": drawn} if body.picture_parts else {"content": None, "images": drawn}
    return message | ({"reasoning_content": thought[0]} if thought else {})


async def _image(picture: Image.Image) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{await encoded(picture)}"}}


def _reason(ticket: Ticket) -> str:
    """ "length" where a text was cut, or where no more rounds were allowed."""
    unfinished = ticket.plan.options.output == "interleaved" and not isinstance(ticket.outputs[-1], str)
    return "length" if was_cut(ticket) or unfinished else "stop"


def _usage(ticket: Ticket) -> dict:
    prompt, written, _ = token_counts(ticket)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
