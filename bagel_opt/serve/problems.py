"""What is wrong with a body, said of the field as the client wrote it."""

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bagel_opt.errors import shown
from bagel_opt.serve.errors import ApiError

T = TypeVar("T", bound=BaseModel)
LONGEST = 64  # characters of a name that is told back
KINDS = {
    "string": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list of two numbers, as [0.4, 1.0]",  # the only ones that there are
    "dict": "an object",
    "model": "an object",
    "none": "null",
}
# Names of other servers, and what OpenAI's API has that cannot be done here.
ADVICE = {
    "num_inference_steps": "BAGEL calls it num_timesteps, and counts one more",
    "steps": "BAGEL calls it num_timesteps, and counts one more",
    "guidance_scale": "BAGEL calls it cfg_text_scale",
    "cfg_scale": "BAGEL calls it cfg_text_scale",
    "true_cfg_scale": "BAGEL calls it cfg_text_scale",
    "image_guidance_scale": "BAGEL calls it cfg_img_scale",
    "max_new_tokens": "BAGEL calls it max_think_tokens",
    **dict.fromkeys(("mask", "input_image_mask"), "BAGEL cannot fill in a part; say in the prompt what to change"),
    "previous_response_id": "nothing is kept; send all that was said as input",
    "conversation": "nothing is kept; send all that was said as input",
    "file_id": "no files are kept; give a data URL as image_url",
}


def checked(kind: type[T], given: Any) -> T:
    """A body. Raises ApiError."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None


def _refusal(error: ValidationError, given: Any) -> ApiError:
    """Of all that is wrong the first. Where that is a choice of several kinds, the one that goes furthest is what was meant."""
    found = [(_path(one["loc"], one["type"], given), one) for one in error.errors(include_url=False)]
    found.sort(key=lambda one: not ADVICE.keys() & set(one[0][-1:]))  # which helps most
    first = found[0][0]
    alike = [(path, one) for path, one in found if path[: len(first)] == first]
    path = max((path for path, _ in alike), key=len)
    there = [one for where, one in alike if where == path]
    meant = [
        one for one in there if not one["type"].endswith("_type")
    ] or there  # of a right kind, but not as it should be
    reasons = dict.fromkeys(_reason(path, one) for one in meant)
    message, where = " or ".join(reasons).replace(" or must be ", " or "), ".".join(path)
    if not where and (named := re.match(r"(\w+): ", message)):
        return ApiError(400, message, named[1])
    return ApiError(400, f"{where or 'the body'}: {message}", where or None)


def _path(loc: tuple, kind: str, given: Any) -> tuple[str, ...]:
    """pydantic names the kinds of a choice beside keys and indices; only those lead on in what was given."""
    path = []
    for place, part in enumerate(loc, 1):
        keys = given if isinstance(given, dict) else range(len(given)) if isinstance(given, list) else ()
        if part in keys:
            given = given[part]
        elif place < len(loc) or kind != "missing":
            continue
        path.append(shown(f"{part:.{LONGEST}}" if isinstance(part, str) else str(part)))
    if kind.startswith("union_tag"):
        path.append("type")
    return tuple(path)


def _reason(path: tuple[str, ...], error: Any) -> str:
    kind, message, about = error["type"], error["msg"], error.get("ctx", {})
    what = re.fullmatch(r"(\w+?)_(type|parsing|parsing_size|from_float|attributes_type)", kind)
    if kind == "missing" or kind == "union_tag_not_found":
        return "missing"
    if kind == "extra_forbidden":
        return ADVICE.get(path[-1], "no such field; /openapi.json lists them")
    if kind == "union_tag_invalid":
        return f"allowed: {about['expected_tags']}"
    if kind == "literal_error":
        return f"allowed: {about['expected']}"
    if kind == "string_pattern_mismatch":
        return 'must be "WIDTHxHEIGHT" or "auto"'  # the only pattern that there is
    if what and what[1] in KINDS:
        return f"must be {KINDS[what[1]]}"
    return message.removeprefix("Value error, ").replace("Input should", "must").replace(" after validation", "")
