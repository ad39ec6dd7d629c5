"""/v1/images: drawing and editing."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.requests import Request as HttpRequest

from bagel_opt.images import InputImage
from bagel_opt.request import Request
from bagel_opt.serve.answers import ERRORS, ImagesResponse
from bagel_opt.serve.bodies import documented_body, documented_form, json_body, read_json
from bagel_opt.serve.engine_thread import Step, Ticket
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.events import IMAGE_EVENTS, documented
from bagel_opt.serve.forms import read_form
from bagel_opt.serve.image_bodies import EditBody, ImageBody, JsonEditBody
from bagel_opt.serve.problems import checked
from bagel_opt.serve.service import Injected, Service, Source, Work, input_tokens
from bagel_opt.serve.streams import EventStream, TextStream, encoded, filed, sse

router = APIRouter(prefix="/v1/images", responses=ERRORS)


@router.post(
    "/generations",
    response_model=ImagesResponse,
    responses=documented(*IMAGE_EVENTS),
    openapi_extra=documented_body(ImageBody),
)
async def generations(
    http: HttpRequest, service: Injected, body: Annotated[ImageBody, json_body(ImageBody)]
) -> Response:
    """Draws pictures from a text."""
    return await _draw(service, http, body, [], "image_generation")


FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "minItems": 1,
    "description": "One or several pictures, as fields `image` or `image[]`.",
}


@router.post(
    "/edits",
    response_model=ImagesResponse,
    responses=documented(*IMAGE_EVENTS),
    openapi_extra=documented_form(EditBody, "image", FILES, JsonEditBody, required=True),
)
async def edits(http: HttpRequest, service: Injected) -> Response:
    """Draws a changed picture: unless a size is given, of the last input picture's as it is read."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body = await read_json(http, JsonEditBody, ", or as multipart/form-data with the picture in `image`")
        urls = [(one.image_url, f"images.{place}.image_url") for place, one in enumerate(body.images)]
        sources = [service.source(*one, http.state.pictures) for one in urls]
        http.state.pictures.clear()
        return await _draw(service, http, body, sources, "image_edit")
    fields, files = await read_form(http, ("image", "image[]"))
    if not files:
        raise ApiError(400, "image: missing", "image")
    names = [f"image.{place}" for place in range(len(files))] if len(files) > 1 else ["image"]
    sources = [Source(name, files.pop(0)) for name in names]
    return await _draw(service, http, checked(EditBody, fields), sources, "image_edit")


async def _draw(service: Service, http: HttpRequest, body: ImageBody, sources: list[Source], kind: str) -> Response:
    service.check_model(body.model)
    if body.response_format == "url" and not service.links:
        message = (
            "response_format: replicas give no addresses, since any of them may be asked for a picture; use b64_json"
        )
        raise ApiError(400, message, "response_format")
    field = sources[0].param.partition(".")[0] if sources else "image"
    timesteps = body.num_timesteps or service.engine.model.defaults.num_timesteps
    service.limits.check(body.n, timesteps, len(sources), field)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    options = body.drawing_options() | body.text_options()

    def make(pictures: list[InputImage]) -> list[Request]:
        return [Request([*pictures, body.prompt], seed=(seed + i) % 2**63, **options) for i in range(body.n)]

    work = Work(sources, make, kind, body.reading_options(), field, body.n, spelled=body.spelled())
    work.progress, work.partial_images = body.stream, body.partial_images
    tickets = await service.submit(http, work)
    if body.stream:
        return EventStream(service, tickets[0], _events(service, body, tickets[0], kind))
    data = []
    for ticket, (*thought, picture) in zip(tickets, await service.results(http, tickets), strict=True):
        if body.response_format == "url":
            file = await filed(picture, body.output_format, body.output_compression)
            data.append({"url": f"{http.base_url}pictures/{service.links.keep(file, body.output_format)}"})
        else:
            data.append({"b64_json": await _encoded(picture, body)})
        data[-1]["seed"] = ticket.plan.options.seed
        data[-1] |= {"thought": thought[0]} if thought else {}
    about = _about(body, tickets[0])
    return JSONResponse({"created": int(time.time()), "data": data, **about, "usage": _usage(tickets)})


async def _events(service: Service, body: ImageBody, ticket: Ticket, kind: str) -> AsyncIterator[str]:
    about = {"created_at": int(time.time()), **_about(body, ticket)}
    partial, text = 0, TextStream(service.engine.model.tokenizer, ticket.plan.options.stops)
    async for event in ticket:
        if isinstance(event, Step):
            progress = {"type": f"{kind}.progress", "index": event.index, "total": event.total}
            yield sse(progress, progress["type"])
            if event.picture is not None:
                found = {"type": f"{kind}.partial_image", "b64_json": await _encoded(event.picture, body)}
                yield sse(found | {"partial_image_index": partial} | about, found["type"])
                partial += 1
        elif delta := text.push(event):
            yield sse({"type": f"{kind}.thought", "delta": delta}, f"{kind}.thought")
    *thought, picture = ticket.outputs
    done = {"type": f"{kind}.completed", "b64_json": await _encoded(picture, body), "seed": ticket.plan.options.seed}
    done |= {"thought": thought[0]} if thought else {}
    yield sse(done | about | {"usage": _usage([ticket])}, done["type"])


async def _encoded(picture: Image.Image, body: ImageBody) -> str:
    return await encoded(picture, body.output_format, body.output_compression)


def _about(body: ImageBody, ticket: Ticket) -> dict:
    height, width = ticket.size
    return {
        "size": f"{width}x{height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }


def _usage(tickets: list[Ticket]) -> dict:
    text, image = (sum(counts) for counts in zip(*(input_tokens(ticket.plan) for ticket in tickets), strict=True))
    drawn = sum(ticket.plan.canvas.tokens for ticket in tickets)
    thought = sum(len(ticket.tokens) for ticket in tickets)
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": drawn + thought,
        "output_tokens_details": {"text_tokens": thought, "image_tokens": drawn},
        "total_tokens": text + image + drawn + thought,
    }
