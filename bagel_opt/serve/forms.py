"""Forms: what multipart/form-data says, as JSON would. Their values are texts; an empty one is absent."""

import contextlib
from typing import Any

import pydantic_core
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from bagel_opt.option_kinds import Interval, Scales, Texts
from bagel_opt.options import described
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.problems import ADVICE

# Fields whose value is no single one: JSON, or given several times.
SEVERAL = {name for name, option in described().items() if isinstance(option.kind, Interval | Scales | Texts)} | {
    "lora"
}
FIELDS = 96  # of a form, and files


async def read_form(http: HttpRequest, pictures: tuple[str, ...]) -> tuple[dict[str, Any], list[bytes]]:
    """-> (fields, the files in those of `pictures`). Raises ApiError."""
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    async with http.form(max_files=FIELDS, max_fields=FIELDS) as form:
        for name, value in form.multi_items():
            if not value or (isinstance(value, UploadFile) and not value.size and not value.filename):
                continue  # as pages send what was not filled in
            single = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in pictures:
                    raise ApiError(400, f"{name:.64}: {ADVICE.get(single, 'no such file')}", f"{name:.64}")
                files.append(await value.read())
            elif name in pictures:
                raise ApiError(400, f"{name}: must be a file", name)
            elif single in SEVERAL:
                fields[single] = _merged(fields.get(single), _value(value), name != single)
            elif name in fields:
                raise ApiError(400, f"{name:.64}: given twice", f"{name:.64}")
            else:
                fields[name] = value
    return fields, files


def _value(text: str) -> Any:
    if text.startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            return pydantic_core.from_json(text)
    return text


def _merged(before: Any, value: Any, listed: bool) -> Any:
    if before is None:
        return [value] if listed else value
    return [*(before if isinstance(before, list) else [before]), value]
