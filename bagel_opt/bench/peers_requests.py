"""What peers.py asks of servers, in the HTTP API of each, and what came back, and when."""

import base64
import functools
import http.client
import io
import json
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

from bagel_opt.bench.peers_checkpoint import ids_of

# Guidance as both have it by themselves, but for the image scale of pictures, which only edits need; spelled out for either.
GUIDED = {
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 1.0,
    "cfg_interval": [0.4, 1.0],
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
}
EDITED = GUIDED | {"cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"}
# M*'s own words before each question. Ours is told the same, so that it reads as much; for texts it is the same tokens.
SYSTEM = "You are BAGEL, a helpful assistant created by ByteDance."
# Enough to have met each shape twice, guided and, below a time of 0.4, unguided: 12 steps, two of them there.
LIGHT_STEPS, LIGHT_TOKENS = 13, 8
MIXTURE = ("small-pictures", "small-pictures", "questions", "small-pictures", "edits")
MIXTURE += ("small-pictures", "questions", "small-pictures", "questions", "small-pictures")


@dataclass(frozen=True)
class Work:
    """Sides of pictures in pixels, num_timesteps of each, and tokens of an answer."""

    large: int = 1024
    small: int = 512
    timesteps: int = 50
    tokens: int = 128


@dataclass(frozen=True)
class Call:
    """A request. side: of the picture that is to come back, or None where a text is."""

    path: str
    body: bytes
    content_type: str
    side: int | None


@dataclass(frozen=True)
class Answer:
    """seconds: from sending to the end; first: to the first token. error: why there is no answer."""

    seconds: float
    first: float | None = None
    tokens: tuple[int, ...] = ()
    error: str | None = None


class Ours:
    """bagel-opt serve."""

    ready, lighter = "/ready", True

    def picture(self, work: Work, side: int, seed: int, light: bool) -> Call:
        body = {"prompt": _prompt(seed), "size": f"{side}x{side}", "seed": seed, **GUIDED, **self._steps(work, light)}
        return _json("/v1/images/generations", body, side)

    def edit(self, work: Work, seed: int, light: bool) -> Call:
        size = {"size": f"{work.large}x{work.large}"}
        fields = {"prompt": _prompt(seed), "seed": seed, **size, **EDITED, **self._steps(work, light)}
        return _form("/v1/images/edits", fields, _picture(work.large, seed), work.large)

    def question(self, work: Work, seed: int, light: bool, picture: bool) -> Call:
        messages = [{"role": "system", "content": SYSTEM}, _question(work, seed, picture)]
        # The least likely tokens are those that end an answer (peers_checkpoint.py), so all are as long as they may be.
        body = {"messages": messages, "stream": True, "max_tokens": _tokens(work, light), "seed": seed}
        return _json("/v1/chat/completions", body, None)

    def _steps(self, work: Work, light: bool) -> dict[str, int]:
        return {"num_timesteps": min(LIGHT_STEPS, work.timesteps) if light else work.timesteps}


class MStar:
    """mstar-ai 0.2.1. It reads num_timesteps from its config.json alone, and greedy answers have a penalty unless told."""

    ready, lighter = "/health", False

    def picture(self, work: Work, side: int, seed: int, light: bool) -> Call:
        body = {"prompt": _prompt(seed), "width": side, "height": side, "seed": seed, **GUIDED}
        return _json("/v1/images/generations", body, side)

    def edit(self, work: Work, seed: int, light: bool) -> Call:
        fields = {"prompt": _prompt(seed), "width": work.large, "height": work.large, "seed": seed, **EDITED}
        return _form("/v1/images/edits", fields, _picture(work.large, seed), work.large)

    def question(self, work: Work, seed: int, light: bool, picture: bool) -> Call:
        body = {"messages": [_question(work, seed, picture)], "stream": True, "max_tokens": _tokens(work, light)}
        body |= {"seed": seed, "temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
        return _json("/v1/chat/completions", body, None)


Dialect = Ours | MStar


def call_of(row: str, dialect: Dialect, work: Work, seed: int, light: bool = False) -> Call:
    """The request with this number of a row. light: less of it, where the server's API knows how, to warm up."""
    match MIXTURE[seed % len(MIXTURE)] if row == "mixture" else row:
        case "pictures":
            return dialect.picture(work, work.large, seed, light)
        case "small-pictures":
            return dialect.picture(work, work.small, seed, light)
        case "edits":
            return dialect.edit(work, seed, light)
        case kind:
            return dialect.question(work, seed, light, kind == "questions")


def send(url: str, call: Call, timeout: float) -> Answer:
    """Sends it and waits for all of the answer. What goes wrong is in the answer."""
    parts, begun, first = urlsplit(url), time.perf_counter(), None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("POST", call.path, call.body, {"Content-Type": call.content_type})
        response = connection.getresponse()
        if response.status != 200:
            return Answer(
                time.perf_counter() - begun, error=f"{response.status}: {response.read(300).decode(errors='replace')}"
            )
        if call.side is not None:
            data = response.read()
            seconds = time.perf_counter() - begun
            _check(data, call.side)
            return Answer(seconds)
        said = []
        for line in response:
            if delta := _delta(line):
                first = first or time.perf_counter() - begun
                said.append(delta)
        seconds = time.perf_counter() - begun
        tokens = tuple(ids_of("".join(said)))
        return Answer(seconds, first, tokens, None if tokens else "an empty text")
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        return Answer(time.perf_counter() - begun, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def _delta(line: bytes) -> str:
    """The text in a line of a chat's stream."""
    if not line.startswith(b"data: {"):
        return ""
    event = json.loads(line.removeprefix(b"data: "))
    if "error" in event:
        raise ValueError(f"in the stream: {event['error']}")
    return event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""


def _check(data: bytes, side: int) -> None:
    with Image.open(io.BytesIO(base64.b64decode(json.loads(data)["data"][0]["b64_json"]))) as picture:
        picture.load()
    if picture.size != (side, side):
        raise ValueError(f"a picture of {picture.width}x{picture.height}, not {side}x{side}")


def _prompt(seed: int) -> str:
    return f"a red circle and {seed} blue stars"


def _tokens(work: Work, light: bool) -> int:
    return min(LIGHT_TOKENS, work.tokens) if light else work.tokens


def _question(work: Work, seed: int, picture: bool) -> dict:
    text = f"what is in picture {seed}?"
    if not picture:
        return {"role": "user", "content": text}
    url = "data:image/png;base64," + base64.b64encode(_picture(work.large, seed)).decode()
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
    }


@functools.lru_cache(64)
def _picture(side: int, seed: int) -> bytes:
    """A PNG that no other seed below a few hundred has."""
    picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    left, top = side * (seed % 16) // 32, side * (seed // 16 % 16) // 32
    ImageDraw.Draw(picture).ellipse((left, top, left + side // 3, top + side // 3), fill="red")
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _json(path: str, body: dict, side: int | None) -> Call:
    return Call(path, json.dumps(body).encode(), "application/json", side)


def _form(path: str, fields: dict, picture: bytes, side: int) -> Call:
    """multipart/form-data (RFC 7578): values that are no texts as JSON, and the picture as `image`."""
    mark = secrets.token_hex(16)
    parts = []
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode())
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="in.png"\r\nContent-Type: image/png\r\n\r\n'
    parts += [head.encode(), picture, f"\r\n--{mark}--\r\n".encode()]
    return Call(path, b"".join(parts), f"multipart/form-data; boundary={mark}", side)
