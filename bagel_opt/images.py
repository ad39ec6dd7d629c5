"""Pictures on the host: PIL modes, BAGEL's resize rules, pixels, patches and latent tokens, in NumPy."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from bagel_opt.config import MAX_PIXELS, BagelConfig, ResizeConfig

MAX_ASPECT = 200  # beyond it the resize rule squeezes a picture into something unrecognisable


@dataclass(frozen=True, eq=False)
class InputImage:
    """An input image, resized by the VAE rule and then, for each encoder, by that encoder's rule.

    The rule changes very long images again when it is applied twice; the picture to draw has the size of the first.
    vae, vit: None while the image itself is still to be drawn.
    """

    size: tuple[int, int]  # (height, width) after the first
    vae_grid: tuple[int, int]
    vit_grid: tuple[int, int]
    vae: Image.Image | None = None
    vit: Image.Image | None = None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any PIL mode to RGB; RGBA and palette transparency are laid on white."""
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return image.convert("RGB")


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
    size = resized(image.size, limits)
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
