"""/v1/responses: texts and pictures in; a text out, or with the tool image_generation a picture."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HttpRequest

from bagel_opt.serve.answers import ERRORS, ResponsesAnswer
from bagel_opt.serve.bodies import documented_body, json_body
from bagel_opt.serve.engine_thread import Step, Ticket
from bagel_opt.serve.events import RESPONSE_EVENTS, documented
from bagel_opt.serve.response_bodies import Drawn, ImageInput, ResponsesBody, TextInput, Turn
from bagel_opt.serve.said import Said, as_work, in_turn
from bagel_opt.serve.service import Injected, Service, token_counts, was_cut
from bagel_opt.serve.streams import EventStream, TextStream, encoded, sse

router = APIRouter(prefix="/v1", responses=ERRORS)


@router.post(
    "/responses",
    response_model=ResponsesAnswer,
    responses=documented(*RESPONSE_EVENTS),
    openapi_extra=documented_body(ResponsesBody),
)
async def responses(
    http: HttpRequest, service: Injected, body: Annotated[ResponsesBody, json_body(ResponsesBody)]
) -> Response:
    """Answers, or with the tool image_generation draws. Nothing is kept: send all that was said as input."""
    model = service.check_model(body.model)
    options = body.drawing_options() | body.text_options()
    options["seed"] = secrets.randbits(32) if body.seed is None else body.seed
    output = "image" if body.tool else "text"
    work = as_work(http, service, _said(body), output, options, body.reading_options())
    work.longest, work.spelled = body.max_output_tokens, body.spelled()
    if body.tool and body.stream:
        work.progress, work.partial_images = True, body.tool.partial_images
    [ticket] = await service.submit(http, work)
    about = _about(body, model)
    if body.stream:
        return EventStream(service, ticket, _events(service, body, ticket, about))
    await service.results(http, [ticket])
    ids = [_id(kind) for kind in ("rs", "ig" if body.tool else "msg")]
    *thought, last = ticket.outputs
    items = [_thought(ids[0], text) for text in thought]
    items.append(
        _picture(ids[1], body, ticket, await _encoded(last, body)) if body.tool else _message(ids[1], last, ticket)
    )
    return JSONResponse(about | _ended(ticket, items))


class Events:
    """Numbers them, and knows the items that are done."""

    def __init__(self):
        self.count, self.items = 0, []

    def __call__(self, kind: str, **fields: Any) -> str:
        self.count += 1
        return sse({"type": f"response.{kind}", "sequence_number": self.count - 1, **fields}, f"response.{kind}")

    def begin(self, item: dict) -> str:
        return self("output_item.added", output_index=len(self.items), item=item)

    def end(self, item: dict) -> str:
        self.items.append(item)
        return self("output_item.done", output_index=len(self.items) - 1, item=item)


async def _events(service: Service, body: ResponsesBody, ticket: Ticket, about: dict) -> AsyncIterator[str]:
    event = Events()
    yield event("created", response=about | {"status": "in_progress"})
    yield event("in_progress", response=about | {"status": "in_progress"})
    text = TextStream(service.engine.model.tokenizer, ticket.plan.options.stops)
    async for told in (_drawing if body.tool else _writing)(event, text, body, ticket):
        yield told
    ended = _ended(ticket, event.items)
    yield event(ended["status"], response=about | ended)


async def _writing(event: Events, text: TextStream, _: ResponsesBody, ticket: Ticket) -> AsyncIterator[str]:
    own = _id("msg")
    part = {"item_id": own, "output_index": 0, "content_index": 0}
    yield event.begin(_message(own, None, ticket))
    yield event("content_part.added", part=_text(""), **part)
    async for token in ticket:
        if delta := text.push(token):
            yield event("output_text.delta", delta=delta, logprobs=[], **part)
    [whole] = ticket.outputs
    if rest := text.until(whole):
        yield event("output_text.delta", delta=rest, logprobs=[], **part)
    yield event("output_text.done", text=whole, logprobs=[], **part)
    yield event("content_part.done", part=_text(whole), **part)
    yield event.end(_message(own, whole, ticket))


async def _drawing(event: Events, text: TextStream, body: ResponsesBody, ticket: Ticket) -> AsyncIterator[str]:
    thinking, own = {"item_id": _id("rs"), "output_index": 0, "content_index": 0}, _id("ig")
    part = {"item_id": own, "output_index": int(bool(body.think))}
    if body.think:
        yield event.begin(_thought(thinking["item_id"], None))
    partial = -1  # before the first flow step
    async for found in ticket:
        if not isinstance(found, Step):
            if delta := text.push(found):
                yield event("reasoning_text.delta", delta=delta, **thinking)
            continue
        if partial < 0:
            partial = 0
            if body.think:
                if rest := text.until(text.whole()):
                    yield event("reasoning_text.delta", delta=rest, **thinking)
                yield event("reasoning_text.done", text=text.whole(), **thinking)
                yield event.end(_thought(thinking["item_id"], text.whole()))
            yield event.begin(_picture(own, body, ticket, None))
            yield event("image_generation_call.in_progress", **part)
            yield event("image_generation_call.generating", **part)
        if found.picture is not None:
            picture = {"partial_image_b64": await _encoded(found.picture, body), "partial_image_index": partial}
            yield event("image_generation_call.partial_image", **part, **picture)
            partial += 1
    yield event("image_generation_call.completed", **part)
    yield event.end(_picture(own, body, ticket, await _encoded(ticket.outputs[-1], body)))


def _said(body: ResponsesBody) -> list[Said]:
    """All that was said, in order."""
    found = [Said("instructions", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*found, Said("input", body.input)]
    for place, item in enumerate(body.input):
        where = f"input.{place}"
        if isinstance(item, Drawn):
            found.append(Said(f"{where}.result", url=item.result))
        elif isinstance(item, Turn) and isinstance(item.content, str):
            found.append(Said(f"{where}.content", item.content))
        elif isinstance(item, Turn):
            found += in_turn([_part(part, f"{where}.content.{i}") for i, part in enumerate(item.content)])
    return found


def _part(part: TextInput | ImageInput, where: str) -> Said:
    is_text = isinstance(part, TextInput)
    return Said(f"{where}.text", part.text) if is_text else Said(f"{where}.image_url", url=part.image_url)


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _about(body: ResponsesBody, model: str) -> dict:
    """What a response says besides its answer."""
    asked = body.model_dump(include={"instructions", "max_output_tokens", "tools", "tool_choice"}, exclude_unset=True)
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "store": False,
        "temperature": body.temperature or 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "usage": None,
        "metadata": body.metadata or {},
        **asked,
    }


def _ended(ticket: Ticket, items: list[dict]) -> dict:
    prompt, written, texts = token_counts(ticket)
    cut = was_cut(ticket)
    return {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": texts if ticket.plan.draws else 0},
            "total_tokens": prompt + written,
        },
    }


def _text(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(own: str, text: str | None, ticket: Ticket) -> dict:
    """text: None while it is being written."""
    status = "in_progress" if text is None else "incomplete" if was_cut(ticket) else "completed"
    content = [] if text is None else [_text(text)]
    return {"id": own, "type": "message", "role": "assistant", "status": status, "content": content}


def _thought(own: str, text: str | None) -> dict:
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    status = "in_progress" if text is None else "completed"
    return {"id": own, "type": "reasoning", "summary": [], "content": content, "status": status}


def _picture(own: str, body: ResponsesBody, ticket: Ticket, result: str | None) -> dict:
    height, width = ticket.size
    return {
        "id": own,
        "type": "image_generation_call",
        "status": "in_progress" if result is None else "completed",
        "result": result,
        "output_format": body.tool.output_format,
        "size": f"{width}x{height}",
        "seed": ticket.plan.options.seed,
    }


async def _encoded(picture: Any, body: ResponsesBody) -> str:
    return await encoded(picture, body.tool.output_format, body.tool.output_compression)
