"""Pictures and videos from clients, checked before they are decoded."""

import base64
import binascii
import io
import re

from PIL import Image, ImageOps

from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.limits import VIDEO_PIXELS, Limits
from bagel_opt.videos import Video, read_video

FORMATS = ("PNG", "JPEG", "WEBP")
HEAD = re.compile(rb"data:[^,]{,120};base64,", re.IGNORECASE)  # of whatever kind: the picture itself says which it is
# As some JSON writers have them; lines may be wrapped.
ESCAPED = {b"\\/": b"/", b"\\u002f": b"/", b"\\u002b": b"+", b"\\u003d": b"=", b"\\n": b"", b"\\r": b""}
AT_ONCE = 2**20  # characters: nothing else runs in Python meanwhile


def decode_data_url(url: "memoryview | bytes", param: str) -> bytes:
    """The bytes of a base64 data URL, or of its base64 alone, as it stands in JSON."""
    if not (head := HEAD.match(url)) and b":" in bytes(url[:16]):
        why = "addresses are not fetched here; give" if re.match(b"https?:", url) else "not"
        raise ApiError(400, f"{param}: {why} a data URL of a picture (data:image/png;base64,...)", param)
    text = url[head.end() if head else 0 :]
    if any(b"\\" in bytes(text[at : at + AT_ONCE]) for at in range(0, len(text), AT_ONCE)):
        text = bytes(text)
        for escaped, plain in ESCAPED.items():
            text = text.replace(escaped, plain).replace(escaped.upper().replace(b"U", b"u"), plain)
    pieces, rest = [], b""
    try:
        for at in range(0, len(text), AT_ONCE):
            piece = rest + bytes(text[at : at + AT_ONCE]).translate(None, b" \r\n")
            whole = len(piece) - len(piece) % 4
            pieces.append(base64.b64decode(piece[:whole], validate=True))
            rest = piece[whole:]
        return b"".join([*pieces, base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)])
    except binascii.Error:
        raise ApiError(400, f"{param}: not valid base64", param) from None


def decode_picture(data: bytes, limits: Limits, param: str) -> Image.Image:
    """Bytes from a client as an upright picture; its size is checked before its pixels are decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.pixels:
            raise ApiError(400, f"{param}: {image.width}x{image.height} is more than {limits.pixels} pixels", param)
        image.load()
        return ImageOps.exif_transpose(image)
    except ApiError:
        raise
    except Exception:  # Pillow raises many kinds for damaged files
        raise ApiError(400, f"{param}: not a readable {', '.join(FORMATS)} picture", param) from None


def decode_video(data: bytes, param: str) -> Video | None:
    """Bytes from a client as a video; None where they are a picture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return None
    except Exception:  # whatever Pillow raises: it is no picture then
        pass
    try:
        return read_video(data, None, VIDEO_PIXELS)
    except ValueError as error:
        why = str(error).removeprefix("video: ")
        raise ApiError(400, f"{param}: no {', '.join(FORMATS)} picture, and as a video: {why}", param) from None
