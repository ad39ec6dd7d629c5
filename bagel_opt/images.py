"""Pictures on the host: PIL modes, BAGEL's resize rules, pixels, patches and latent tokens, in NumPy."""

import io
import math
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from bagel_opt.config import MAX_PIXELS, BagelConfig, ResizeConfig
from bagel_opt.errors import reason

MAX_ASPECT = 200  # beyond it the resize rule squeezes a picture into something unrecognisable
# What is white in modes of more than 8 bits: the least of these that no pixel exceeds. Mode I has none of its own: files of
# 16 bits are read into it, and arrays of 8.
WHITE = {"I": (255, 65535), "F": (1, 255), **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), (65535,))}


@dataclass(frozen=True)
class Canvas:
    """A picture as rows and columns of latent tokens."""

    config: BagelConfig
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return tuple(side * self.config.token_pixels for side in self.grid)

    @property
    def places(self) -> np.ndarray:
        """Where its tokens are in the table of positions."""
        return positions(*self.grid, self.config.latent_side)

    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of the VAE's posterior, where it is an input."""
        side = self.config.latent_patch_size
        return 1, self.config.vae.z_channels, self.grid[0] * side, self.grid[1] * side

    def latents(self, tokens_NC: np.ndarray) -> list[np.ndarray]:
        """What the VAE decodes, a call each: [1, Z, H, W]."""
        return [untokens(tokens_NC, *self.grid, self.config.latent_patch_size)[None]]


@dataclass(frozen=True, eq=False)
class InputImage:
    """An input image, resized by the VAE rule and then, for each encoder, by that encoder's rule.

    The rule changes very long images again when it is applied twice; the picture to draw has the size of the first.
    original: (height, width) before. vae, vit: None while the image itself is still to be drawn.
    """

    config: BagelConfig
    original: tuple[int, int]
    size: tuple[int, int]  # (height, width) after the first
    vae_grid: tuple[int, int]
    vit_grid: tuple[int, int]
    vae: Image.Image | None = None
    vit: Image.Image | None = None

    @property
    def canvas(self) -> Canvas:
        """Of its latent tokens."""
        return Canvas(self.config, self.vae_grid)

    def patches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the ViT reads, a call each: patches [P, K], and their places in the table of positions [P]."""
        places = positions(*self.vit_grid, self.config.vit_side)
        return [(patches(self.vit, self.config.vit.patch_size), places)]

    def frames(self) -> list[np.ndarray]:
        """What the VAE encodes, a call each: pixels [1, 3, H, W]."""
        return [pixels(self.vae)[None]]

    def latents(self, moments: list[np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Latent tokens [tokens, channels] drawn from the VAE's posterior, which a call each gave."""
        mean, log_variance = np.split(moments[0], 2, axis=1)
        z = mean + np.exp(np.float32(0.5) * log_variance) * noise
        vae = self.config.vae
        scaled = np.float32(vae.scale_factor) * (z - np.float32(vae.shift_factor))
        return tokens(scaled[0], self.config.latent_patch_size)


def open_picture(source: str | os.PathLike | bytes, where: str) -> Image.Image:
    """A picture from a file's path or its bytes, turned upright as its EXIF data say; of several frames the first. where: what
    an error begins with. Raises FileNotFoundError, and ValueError for what Pillow cannot read."""
    name = "these bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: there is no picture {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{where}: {name} is no picture that Pillow can read; give PNG, JPEG or WebP") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"{where}: the picture {name} cannot be read: {reason(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any PIL mode to RGB; what is transparent is laid on white. Modes of more than 8 bits are brought
    from 0 to WHITE down to 8. Raises ValueError where their numbers lie elsewhere, and what Pillow does for damaged files."""
    if image.mode in WHITE:
        image = _in_8_bits(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return image.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Of a mode in WHITE, as grey; with the one number that is transparent, where there is such."""
    values, transparent, whites = np.asarray(image), image.info.get("transparency"), WHITE[image.mode]
    low, high = values.min(), values.max()  # NaN where there is one
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        ranges = " or ".join(f"0 to {white}" for white in whites)
        raise ValueError(f"its mode {image.mode} holds numbers from {low} to {high}; allowed: {ranges}, so scale them")
    grey = Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def resized(size: tuple[int, int], limits: ResizeConfig) -> tuple[int, int]:
    """(width, height) after BAGEL's rule: longest side, shortest side, stride, then total pixels, then longest side."""

    def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
        def divisible(side: int) -> int:
            return max(limits.stride, round(side / limits.stride) * limits.stride)

        return divisible(round(width * scale)), divisible(round(height * scale))

    scale = max(min(limits.max_size / max(size), 1.0), limits.min_size / min(size))
    width, height = scaled(*size, scale)
    if width * height > MAX_PIXELS:
        width, height = scaled(width, height, MAX_PIXELS / (width * height))
    if max(width, height) > limits.max_size:
        width, height = scaled(width, height, limits.max_size / max(width, height))
    return width, height


def resize(image: Image.Image, limits: ResizeConfig) -> Image.Image:
    return resize_to(image, resized(image.size, limits))


def resize_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image on (width, height) pixels, as the official code resizes, there and back."""
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def check_image(image: Image.Image, where: str) -> None:
    """Raises ValueError for a picture without pixels or too thin to be resized sensibly."""
    if min(image.size) < 1 or max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"{where}: an image of {image.width}x{image.height} pixels is too thin; "
            f"the longer side may be at most {MAX_ASPECT} times the shorter, so crop or pad it"
        )


def pixels(image: Image.Image) -> np.ndarray:
    """An RGB picture as float32 [3, height, width] in [-1, 1]."""
    array_HWC = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.ascontiguousarray((array_HWC.transpose(2, 0, 1) - np.float32(0.5)) / np.float32(0.5))


def tokens(array_CHW: np.ndarray, patch: int) -> np.ndarray:
    """Cuts [C, H, W] into squares: [tokens, patch * patch * C], each flattened as (row, column, channel)."""
    channels, height, width = array_CHW.shape
    h, w = height // patch, width // patch
    cut = array_CHW[:, : h * patch, : w * patch].reshape(channels, h, patch, w, patch)
    return np.ascontiguousarray(cut.transpose(1, 3, 2, 4, 0).reshape(h * w, patch * patch * channels))


def patches(image: Image.Image, patch: int) -> np.ndarray:
    """`tokens` of `pixels`. What is cut is bytes, which takes a quarter of the time."""
    bytes_HWC = np.asarray(image)
    height, width, channels = bytes_HWC.shape
    h, w = height // patch, width // patch
    cut = bytes_HWC[: h * patch, : w * patch].reshape(h, patch, w, patch, channels).transpose(0, 2, 1, 3, 4)
    found = cut.reshape(h * w, -1).astype(np.float32)
    for value, change in ((255, np.divide), (0.5, np.subtract), (0.5, np.divide)):
        change(found, np.float32(value), out=found)
    return found


def untokens(tokens_NC: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """The inverse of `tokens`: [C, height * patch, width * patch] from height x width tokens."""
    cut = tokens_NC.reshape(height, width, patch, patch, -1).transpose(4, 0, 2, 1, 3)
    return np.ascontiguousarray(cut.reshape(cut.shape[0], height * patch, width * patch))


def positions(height: int, width: int, side: int) -> np.ndarray:
    """Indices into a side x side position table for a height x width grid of tokens, row by row."""
    return (np.arange(height)[:, None] * side + np.arange(width)).reshape(-1).astype(np.int64)


def check_grid(height: int, width: int, side: int, unit: int, where: str) -> None:
    """Raises ValueError where a grid of tokens is larger than the model's position table."""
    if max(height, width) > side:
        raise ValueError(
            f"{where}: {height * unit}x{width * unit} pixels (height x width) is {height}x{width} tokens, "
            f"beyond the model's {side}x{side} position table; at most {side * unit} pixels a side"
        )


def latent_grid(height: int, width: int, config: BagelConfig) -> tuple[int, int]:
    """Rows and columns of latent tokens of a picture."""
    return height // config.token_pixels, width // config.token_pixels
