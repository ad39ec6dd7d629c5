"""JSON bodies, bounded before anything is made of them."""

import re
import secrets
from collections.abc import Container
from typing import Any, TypeVar

import pydantic_core
from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request as HttpRequest

from bagel_opt.errors import shown
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.limits import BODY_DEPTH, BODY_ITEMS, BODY_PICTURES, BODY_TEXT, BODY_VALUES
from bagel_opt.serve.problems import checked

T = TypeVar("T", bound=BaseModel)
HEAD = 128  # bytes in which the head of a data URL ends
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.ASCII | re.IGNORECASE)
MARKS = (b'"data:', b'"result":"', b'"result": "')  # before a data URL, and before base64 as /v1/responses has it
BACKSLASH = ord("\\")
SCHEMAS = "#/components/schemas/"


def json_body(kind: type[T]) -> Any:
    """A dependency: the body as a `kind`, its data URLs cut out and in `http.state.pictures`, by what stands for them.

    They may be 32 MB, the rest is small: so a parser, which holds up all else, never has long to do.
    It raises ApiError, and keeps nothing of the bytes but the pictures.
    """

    async def read(http: HttpRequest) -> T:
        return await read_json(http, kind)

    return Depends(read)


async def read_json(http: HttpRequest, kind: type[T], also: str = "") -> T:
    """The same, as a function. also: what else might have been sent."""
    given = http.headers.get("content-type")
    if not JSON_TYPE.match(given or ""):
        told = f"Content-Type is {shown(given)!r:.80}" if given else "there is no Content-Type"
        raise ApiError(415, f"{told}; send the body as application/json{also}")
    chunks = [chunk async for chunk in http.stream()]
    text, http.state.pictures = cut_pictures(b"".join(chunks))
    if not text:
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    return checked(kind, parse(text, http.state.pictures))


def cut_pictures(data: bytes) -> tuple[bytes, dict[str, memoryview]]:
    """-> (JSON in which a name stands for each string with a picture in base64, those strings by their names). Raises
    ApiError where that JSON is larger than BODY_TEXT."""
    view, pieces, pictures, token = memoryview(data), [], {}, secrets.token_hex(8)
    kept = end = 0
    marks = dict.fromkeys(MARKS, 0)  # where each comes next; -1 if no more
    for _ in range(BODY_PICTURES):  # what is left then is too large to be parsed, unless it is as small as any text
        for mark, at in marks.items():
            if 0 <= at <= end:
                marks[mark] = data.find(mark, end)
        begin, mark = min(((at, mark) for mark, at in marks.items() if at >= 0), default=(-1, b""))
        before, begin = begin, begin + len(mark.rpartition(b'"')[0])
        if before < 0 or (end := data.find(b'"', begin + 1)) < 0:
            break
        other = mark is MARKS[0] and b";base64," not in data[begin : min(end, begin + HEAD)]
        if other or BACKSLASH in (data[before - 1], data[end - 1]):
            continue  # a text, which may hold escaped quotation marks
        name = f"{token}-{len(pictures)}"
        pictures[name] = view[begin + 1 : end]
        pieces += [view[kept : begin + 1], name.encode()]
        kept = end
    pieces.append(view[kept:])
    if sum(map(len, pieces)) > BODY_TEXT:
        message = f"the body is larger than {BODY_TEXT} bytes, its data URLs not counted"
        raise ApiError(413, message, code="body_too_large")
    return b"".join(pieces), pictures


def parse(text: bytes, pictures: Container[str] = ()) -> Any:
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    _count(value, pictures, 0, 0)
    return value


def _count(value: Any, pictures: Container[str], before: int, depth: int, name: str = "") -> int:
    """name: of the value. -> values so far. They are bounded, since pydantic keeps an error for each that is wrong."""
    if not isinstance(value, dict | list):
        return before
    before += len(value)
    for what, found, most in (
        ("nested lists and objects", depth, BODY_DEPTH),
        ("items in a list or an object", len(value), BODY_ITEMS),
        ("values", before, BODY_VALUES),
    ):
        if found > most:
            field = shown(name)[:64]
            message = f"{field}: " * bool(field) + f"the body has more than {most} {what}"
            raise ApiError(400, message, field or None, "body_too_complex")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, str) and item in pictures and key not in ("url", "image_url", "result"):
            raise ApiError(400, f"{key}: a picture's data URL belongs into image_url", str(key))
        before = _count(item, pictures, before, depth + 1, key if isinstance(key, str) else name)
    return before


def documented_body(kind: type[BaseModel]) -> dict:
    """What a route says of its body in the OpenAPI document."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def documented_form(
    kind: type[BaseModel], name: str, file: dict[str, Any], as_json: type[BaseModel], required: bool = False
) -> dict:
    """The same of a form with files, or JSON in its place. name: of the files' field; file: its schema."""
    schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
    schema.pop("$defs", None)
    schema["properties"][name] = file
    schema["required"] = [*schema["required"], *([name] if required else [])]
    found = documented_body(as_json)
    found["requestBody"]["content"] = {"multipart/form-data": {"schema": schema}, **found["requestBody"]["content"]}
    return found


def add_schemas(app: FastAPI, *kinds: type[BaseModel]) -> None:
    """Puts the schemas of bodies into the OpenAPI document; FastAPI knows only those that it parses itself."""

    def openapi() -> dict:
        if not app.openapi_schema:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMAS + "{model}")
            document["components"]["schemas"] |= found["$defs"]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
