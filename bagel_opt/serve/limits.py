"""What a request may be at most."""

from dataclasses import dataclass

from bagel_opt.serve.errors import ApiError

# Of a JSON body, however large its pictures are. A text of the longest that is taken has 384,000 bytes where each
# character is escaped, and the longest chat some 2,000 values.
BODY_TEXT = 2**19  # bytes besides data URLs
BODY_PICTURES = 256  # data URLs
BODY_VALUES = 4096
BODY_ITEMS = 256  # of one list or object
BODY_DEPTH = 16
VIDEO_PIXELS = 2**30  # of an input video, all its frames together, as they are decoded


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a whole request; pixels: of one input picture, decoded; images: input pictures of one request;
    pictures: n; timesteps: num_timesteps."""

    body_bytes: int = 32 * 2**20
    pixels: int = 4096 * 4096
    images: int = 8
    pictures: int = 8
    timesteps: int = 200

    @property
    def bodies_bytes(self) -> int:
        """Of all bodies that are being read or planned at a time; others wait before they are read."""
        return 4 * self.body_bytes

    def check(self, pictures: int, timesteps: int, images: int, image: str = "image", drawn: str = "n") -> None:
        """Raises ApiError naming the field; `image`: the one that has the pictures; `drawn`: that says how many to draw."""
        values = {drawn: (pictures, self.pictures), "num_timesteps": (timesteps, self.timesteps)}
        for name, (value, most) in (values | {image: (images, self.images)}).items():
            if value > most:
                raise ApiError(400, f"{name}: {value} is more than the {most} that this server allows", name)
