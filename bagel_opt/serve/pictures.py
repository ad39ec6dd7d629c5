"""Pictures from clients, checked before they are decoded."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image, ImageOps

from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


def decode_data_url(url: str, param: str) -> bytes:
    """The bytes of a base64 data URL."""
    if not (head := DATA_URL.match(url)):
        raise ApiError(400, f"{param}: not a data URL of a picture (data:image/png;base64,...)", param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: not valid base64", param) from None


def decode_picture(data: bytes, limits: Limits, param: str) -> Image.Image:
    """Bytes from a client as an upright picture; its size is checked before its pixels are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > limits.pixels:
                raise ApiError(400, f"{param}: {image.width}x{image.height} is more than {limits.pixels} pixels", param)
            image.load()
            return ImageOps.exif_transpose(image)
    except ApiError:
        raise
    except Exception:  # Pillow raises many kinds for damaged files
        raise ApiError(400, f"{param}: not a readable {', '.join(FORMATS)} picture", param) from None
