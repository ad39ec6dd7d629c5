"""Fields of bodies: how clients' objects are read, and BAGEL's own options under their official names.

Null is absent. Fields without an effect here are taken with the values that change nothing that was asked for; any other
unknown one is refused.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import core_schema

from bagel_opt.option_kinds import Choice, Flag, Interval, Kind, Number, Scales, Text, Texts
from bagel_opt.options import ADAPTERS, EVERY, INPUTS, INTERLEAVING, PICTURE, READING, SIZE, VIDEO, Option, described

TEXT_LIMIT = 32_000  # characters of one text, as at OpenAI; the profile's slots are the tighter limit
PARTS = 64  # texts and pictures of one request
WHOLE_LIMIT = 2**31  # of whole numbers that have no other
IGNORED = Field(None, description="Ignored.")


class Fields(BaseModel):
    """An object that a client sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict:
        """Says that what may be absent may be null."""
        found = handler(schema)
        document = handler.resolve_ref_schema(found)
        for name, field in document.get("properties", {}).items():
            if name not in document.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
                document["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}
        return found


def _type(kind: Kind) -> Any:
    """What pydantic checks a value of an option with."""
    match kind:
        case Number(low, None, whole=True):
            return Annotated[int, Field(ge=low, le=WHOLE_LIMIT)]
        case Number(low, high, whole=True):  # not le: the document's numbers are floats, and 2**63 - 1 is none
            return Annotated[int, Field(ge=low, lt=high + 1)]
        case Number(low, high):
            return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]
        case Interval(low, high):
            return tuple[(_type(Number(low, high)),) * 2]
        case Choice(values):
            return Literal[values]
        case Flag():
            return bool
        case Text():
            return Annotated[str, Field(max_length=TEXT_LIMIT)]
        case Texts(most, longest):
            text = Annotated[str, Field(min_length=1, max_length=longest)]
            return text | Annotated[list[text], Field(max_length=most)]
        case Scales(low, high):
            return Annotated[dict[str, _type(Number(low, high))], Field(max_length=PARTS)]


def _field(option: Option) -> tuple[Any, Any]:
    default = option.unset if option.default is None else json.dumps(option.default)
    return _type(option.kind) | None, Field(None, description=f"{option.sentence} Default: {default}.")


def _model(name: str, *groups: str) -> type[Fields]:
    """A body's fields of BAGEL's own options. Where one is absent, its default counts."""
    fields = {option.name: _field(option) for option in described(*groups).values()}
    return create_model(name, __base__=Fields, **fields)


class Body(_model("RequestOptions", EVERY, READING, ADAPTERS)):
    lora: _type(described(ADAPTERS)["adapters"].kind) | None = Field(None, description="Another name of adapters.")
    model: str | None = Field(None, description="A name that /v1/models gives; may be left out.")
    user: str | None = IGNORED
    safety_identifier: str | None = IGNORED
    prompt_cache_key: str | None = IGNORED
    prompt_cache_retention: str | None = IGNORED

    def text_options(self) -> dict:
        """What was given of the options of every request, but for the seed, which a server draws where none is."""
        given = self._given(described(EVERY, ADAPTERS).keys() - {"seed"}) | self.reading_options()
        return given if self.lora is None else {**given, "adapters": self.lora}

    def spelled(self) -> dict[str, str]:
        """The client's fields of options that have another name."""
        return {} if self.lora is None else {"adapters": "lora"}

    def reading_options(self) -> dict:
        """What was given of the options on how pictures go in."""
        return self._given(described(READING))

    @model_validator(mode="after")
    def check_names(self) -> "Body":
        if self.lora is not None and self.adapters is not None:
            raise ValueError("lora: given beside adapters; give one of them")
        return self

    def _given(self, names: Iterable[str]) -> dict:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


OWN_SIZES = described(SIZE)["size"].kind.values  # those that BAGEL's own option has
SIZES = rf"^(auto|{'|'.join(OWN_SIZES)}|[0-9]{{1,5}}x[0-9]{{1,5}})$"
ABOUT_SIZES = f'"WIDTHxHEIGHT", "auto" or an option: {described(SIZE)["size"].help}.'


class Drawing(_model("PictureOptions", PICTURE, SIZE, INPUTS)):
    """BAGEL's options of a picture."""

    def drawing_options(self) -> dict:
        given = {name: value for name in Drawing.model_fields if (value := getattr(self, name)) is not None}
        return given if given.get("size") in (None, *OWN_SIZES) else {**given, "size": None}

    def check_sides(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"{'width' if self.width is None else 'height'}: missing; height and width go together")


class Interleaving(_model("InterleavedOptions", INTERLEAVING)):
    """BAGEL's options of texts and pictures in turn."""

    def interleaving_options(self) -> dict:
        return {name: value for name in Interleaving.model_fields if (value := getattr(self, name)) is not None}


class Filming(_model("VideoOptions", VIDEO)):
    """The options of a video."""

    def video_options(self) -> dict:
        return {name: value for name in Filming.model_fields if (value := getattr(self, name)) is not None}


def read_size(size: str | None) -> tuple[int, int] | None:
    """-> (width, height), or None where it is left to the model"""
    return None if size in (None, "auto", *OWN_SIZES) else tuple(map(int, size.split("x")))
