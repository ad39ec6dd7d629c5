"""What was said in a chat or to /v1/responses, and what the engine is to do with it."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from bagel_opt.images import InputImage
from bagel_opt.request import Request
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.fields import PARTS, TEXT_LIMIT
from bagel_opt.serve.service import Service, Work


@dataclass(frozen=True)
class Said:
    """A text, or a picture by its URL. where: the field that has it."""

    where: str
    text: str | None = None
    url: str | None = None


def in_turn(parts: list[Said]) -> list[Said]:
    """A turn as BAGEL reads it: where it has one text, its pictures come before that, as the official code feeds them."""
    texts = sum(part.text is not None for part in parts)
    return sorted(parts, key=lambda part: part.text is not None) if texts == 1 else parts


def as_work(
    http: HttpRequest, service: Service, said: Sequence[Said], output: str, options: dict, reading: dict
) -> Work:
    """options: of the request, with its seed; reading: those with which pictures are read. Raises ApiError."""
    field = said[0].where.partition(".")[0] if said else "messages"
    if not said:
        raise ApiError(400, f"{field}: nothing was said", field)
    if len(said) > PARTS or sum(len(part.text or "") for part in said) > TEXT_LIMIT:
        raise ApiError(400, f"{field}: more than {PARTS} parts or {TEXT_LIMIT} characters", field)
    sources = [service.source(part.url, part.where, http.state.pictures) for part in said if part.url is not None]
    texts = [part.text for part in said]
    http.state.pictures.clear()
    defaults, rounds = service.engine.model.defaults, options.get("max_rounds") or 1
    timesteps = 0 if output == "text" else options.get("num_timesteps") or defaults.num_timesteps
    service.limits.check(rounds, timesteps, len(sources), image=field, drawn="max_rounds")

    def make(pictures: list[InputImage]) -> list[Request]:
        coming = iter(pictures)
        items = [next(coming) if text is None else text for text in texts]
        return [Request(items, output=output, **options)]

    return Work(sources, make, f"chat_{output}", reading, field)
