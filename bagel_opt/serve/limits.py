"""What a request may be at most, and pictures from clients checked against it before they are decoded."""

import base64
import binascii
import io
import re
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps

from bagel_opt.serve.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a whole request; pixels: of one input picture, decoded; images: input pictures of one request;
    pictures: n; timesteps: num_timesteps."""

    body_bytes: int = 32 * 2**20
    pixels: int = 4096 * 4096
    images: int = 8
    pictures: int = 8
    timesteps: int = 200

    def check(self, pictures: int, timesteps: int, images: int, image: str = "image") -> None:
        """Raises ApiError naming the field; `image`: the one that has the pictures."""
        values = {"n": (pictures, self.pictures), "num_timesteps": (timesteps, self.timesteps)}
        for name, (value, most) in (values | {image: (images, self.images)}).items():
            if value > most:
                raise ApiError(400, f"{name}: {value} is more than the {most} that this server allows", name)


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
