"""/v1/videos: a video is asked for, looked after and fetched, each by a request of its own."""

import re
import secrets
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from bagel_opt.images import InputImage
from bagel_opt.options import FPS
from bagel_opt.request import Request
from bagel_opt.sampling.plan import AnyPlan
from bagel_opt.serve.answers import ERRORS, VideoAnswer, VideoDeleted, VideoList
from bagel_opt.serve.bodies import documented_form, read_json
from bagel_opt.serve.engine_thread import Ticket
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.forms import read_form
from bagel_opt.serve.problems import checked
from bagel_opt.serve.service import Injected, Service, Source, Work
from bagel_opt.serve.video_bodies import Listing, Variant, VideoBody
from bagel_opt.serve.videos import Videos
from bagel_opt.videos import Video, check_writing

router = APIRouter(prefix="/v1/videos", responses=ERRORS)
INPUT = "input_reference"
FILE = {"type": "string", "format": "binary", "description": "A picture or a video."}


def _asked(kind: type[BaseModel]) -> dict:
    """What a route says of its query in the OpenAPI document."""
    fields = kind.model_json_schema()["properties"].items()
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in fields]}


@router.post("", response_model=VideoAnswer, openapi_extra=documented_form(VideoBody, INPUT, FILE, VideoBody))
async def create(http: HttpRequest, service: Injected) -> Response:
    """Begins a video: from a text, from a picture that it begins with, or from a video that is edited."""
    videos = _kept(service)
    _check_model(service)
    body, sources = await _read(http, service)
    model, defaults = service.check_model(body.model), service.engine.model.defaults
    service.limits.check(1, body.num_timesteps or defaults.num_timesteps, len(sources), INPUT)
    seed = secrets.randbits(32) if body.seed is None else body.seed
    options = body.drawing_options() | body.text_options() | body.video_options()

    def make(found: list[InputImage | Video]) -> list[Request]:
        return [Request([*found, body.prompt], output="video", seed=seed, **options)]

    def admit(plan: AnyPlan) -> None:
        _check_size(*(plan.resized or plan.canvas.size))
        videos.check_room(plan)

    kind = "video_from_input" if sources else "video_generation"
    work = Work(sources, make, kind, body.reading_options(), INPUT, spelled=body.spelled(), progress=True)
    work.videos, work.admit = True, admit
    [ticket] = await service.submit(http, work)
    fps = body.fps or FPS
    job = videos.begin(http.state.key, _about(ticket, model, body.prompt, fps), fps, ticket)
    return JSONResponse(job.answer())


@router.get("", response_model=VideoList, openapi_extra=_asked(Listing))
async def listed(http: HttpRequest, service: Injected) -> Response:
    """The videos that there are, of this key."""
    asked = checked(Listing, dict(http.query_params))
    jobs = _kept(service).of(http.state.key)
    jobs = jobs if asked.order == "asc" else jobs[::-1]
    if asked.after is not None:
        places = [place for place, job in enumerate(jobs) if job.id == asked.after]
        if not places:
            raise ApiError(400, "after: there is no such video any more; ask for the list from its beginning", "after")
        jobs = jobs[places[0] + 1 :]
    page = [job.answer() for job in jobs[: asked.limit]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, "has_more": len(jobs) > len(page), **ends})


@router.get("/{video_id}", response_model=VideoAnswer)
async def retrieve(video_id: str, http: HttpRequest, service: Injected) -> Response:
    """How far a video is."""
    return JSONResponse(_kept(service).get(video_id, http.state.key).answer())


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}}}},
    openapi_extra=_asked(Variant),
)
async def content(video_id: str, http: HttpRequest, service: Injected) -> Response:
    """The MP4 file of a video that is completed."""
    checked(Variant, dict(http.query_params))
    job = _kept(service).get(video_id, http.state.key)
    if job.error:
        raise ApiError(404, f"there is no content, since the video failed: {job.error.detail}", "video_id")
    if job.data is None:
        message = f"the video is {job.status}, {job.progress}% done; ask again once its status is completed"
        raise ApiError(404, message, "video_id", "video_not_ready")
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, no-store"}
    return Response(job.data, media_type="video/mp4", headers=headers)


@router.delete("/{video_id}", response_model=VideoDeleted)
async def delete(video_id: str, http: HttpRequest, service: Injected) -> Response:
    """Forgets a video; one that is under way is given up."""
    _kept(service).delete(video_id, http.state.key, service.engine)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


def _kept(service: Service) -> Videos:
    if service.videos is None:
        message = "replicas keep no videos, since any of them may be asked for one; start a server without --replicas"
        raise ApiError(400, message, code="videos_not_served")
    return service.videos


def _check_model(service: Service) -> None:
    """Raises ApiError where no video can be made, whatever is asked for."""
    if "video" not in service.engine.model.config.draws:
        message = f"the model {service.names[0]!r} draws no videos; serve a Lance checkpoint that does"
        raise ApiError(400, message, "model", "videos_not_served")
    _check_size(2, 2)


def _check_size(height: int, width: int) -> None:
    try:
        check_writing(width, height)
    except ImportError as error:
        raise ApiError(400, f"this server cannot write videos: {error}", code="videos_not_served") from None
    except ValueError as error:
        raise ApiError(400, f"size: {error}", "size") from None


async def _read(http: HttpRequest, service: Service) -> tuple[VideoBody, list[Source]]:
    """The body, and what it has for input."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body = await read_json(http, VideoBody, f", or as multipart/form-data with a file in `{INPUT}`")
        sources = _reference(service, body, http.state.pictures)
        http.state.pictures.clear()
        return body, sources
    given, files = await read_form(http, (INPUT,))
    if len(files) > 1:
        raise ApiError(400, f"{INPUT}: {len(files)} files; a video has one at most", INPUT)
    fields: dict[str, Any] = {}
    for name, value in given.items():  # clients write the parts of an object so
        part = re.fullmatch(rf"{INPUT}\[(\w+)\]", name)
        fields |= {INPUT: {**fields.get(INPUT, {}), part[1]: value}} if part else {name: value}
    if files and INPUT in fields:
        raise ApiError(400, f"{INPUT}: given twice", INPUT)
    body = checked(VideoBody, fields)
    return body, [Source(INPUT, files.pop())] if files else _reference(service, body, {})


def _reference(service: Service, body: VideoBody, pictures: dict) -> list[Source]:
    found = body.input_reference
    return [service.source(found.image_url, f"{INPUT}.image_url", pictures)] if found else []


def _about(ticket: Ticket, model: str, prompt: str, fps: float) -> dict:
    (height, width), frames = ticket.size, ticket.plan.canvas.frames
    return {
        "model": model,
        "prompt": prompt,
        "size": f"{width}x{height}",
        "seconds": f"{round((frames - 1) / fps, 3):g}",
        "num_frames": frames,
        "fps": fps,
        "seed": ticket.plan.options.seed,
        "remixed_from_video_id": None,
    }
