"""Lance's pictures and videos on the host: which sides they are brought to, pixels, patches and latent tokens, in NumPy."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bagel_opt.images import to_rgb
from bagel_opt.lance.config import DEVIATIONS, FRAMES, MEANS, PLACES, SIDE, LanceConfig

RATIOS = (21 / 9, 16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16)  # width to height
STRIDE = 16  # of sides, for both encoders
RGB_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)  # CLIP's
RGB_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


@dataclass(frozen=True)
class LanceCanvas:
    """A picture or a video as frames, rows and columns of latent tokens."""

    config: LanceConfig
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def first(self) -> int:
        """Tokens of the first latent frame."""
        return self.grid[1] * self.grid[2]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.grid[1] * self.config.token_pixels, self.grid[2] * self.config.token_pixels

    @property
    def frames(self) -> int:
        """That are decoded."""
        return (self.grid[0] - 1) * self.config.vae.frames + 1

    @property
    def places(self) -> np.ndarray:
        frame, row, column = np.indices(self.grid).reshape(3, -1)
        return (frame * SIDE + row) * SIDE + column

    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of the VAE's posterior, where it is an input."""
        return *self.grid, self.config.latent_dim

    def latents(self, tokens_NC: np.ndarray) -> list[np.ndarray]:
        """What the VAE decodes, a call each: latent frames [1, Z, 1, H, W]."""
        latent_FHWZ = tokens_NC.reshape(*self.grid, -1)
        return [np.ascontiguousarray(frame.transpose(2, 0, 1))[None, :, None] for frame in latent_FHWZ]


@dataclass(frozen=True, eq=False)
class LanceInput:
    """A picture, or the frames of a video, brought to the sides that each encoder takes.

    original: (height, width) before. canvas: of its latents. vit_grid: pairs of frames, rows and columns of patches.
    """

    config: LanceConfig
    original: tuple[int, int]
    canvas: LanceCanvas
    vit_grid: tuple[int, int, int]
    vae: Sequence[Image.Image] = ()
    vit: Sequence[Image.Image] = ()

    @property
    def size(self) -> tuple[int, int]:
        return self.canvas.size

    def patches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the ViT reads, a call for each pair of frames: patches [P, K], and their places [P]."""
        c, (pairs, rows, columns) = self.config.vit, self.vit_grid
        merge, patch, depth = c.spatial_merge_size, c.patch_size, c.temporal_patch_size
        row, column = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
        places = (row * PLACES + column).transpose(0, 2, 1, 3).reshape(-1)
        frames = [*self.vit, *[self.vit[-1]] * (pairs * depth - len(self.vit))]  # an odd video repeats its last
        found = []
        for pair in range(pairs):
            pixels = np.stack([_normed(frame) for frame in frames[pair * depth : (pair + 1) * depth]])  # [2, H, W, 3]
            cut = pixels.reshape(depth, rows // merge, merge, patch, columns // merge, merge, patch, -1)
            cut = cut.transpose(1, 4, 2, 5, 7, 0, 3, 6)  # merged row and column, row and column in these, then a patch
            found.append((np.ascontiguousarray(cut.reshape(rows * columns, c.patch_dim)), places))
        return found

    def frames(self) -> list[np.ndarray]:
        """What the VAE encodes, a call each: pixels [1, 3, F, H, W] in [-1, 1]."""
        every, cuts = self.config.vae.frames, range(1, len(self.vae), self.config.vae.frames)
        return [_pixels(part) for part in ([self.vae[0]], *(self.vae[cut : cut + every] for cut in cuts))]

    def latents(self, moments: list[np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Latent tokens [tokens, channels] drawn from the VAE's posterior, which calls gave for frames."""
        mean, log_variance = np.split(np.concatenate(moments, axis=1)[0], 2, axis=-1)
        scaled = (mean - np.float32(MEANS)) / np.float32(DEVIATIONS)
        return (scaled + np.exp(np.float32(0.5) * log_variance) * noise).reshape(self.canvas.tokens, -1)


def _normed(frame: Image.Image) -> np.ndarray:
    return (np.asarray(frame, np.float32) / np.float32(255) - RGB_MEAN) / RGB_DEVIATION


def _pixels(frames: Sequence[Image.Image]) -> np.ndarray:
    pixels_FHWC = np.stack([np.asarray(frame, np.float32) for frame in frames]) / np.float32(255)
    return np.ascontiguousarray(((pixels_FHWC - np.float32(0.5)) / np.float32(0.5)).transpose(3, 0, 1, 2))[None]


def bucket(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The (width, height) of RATIOS, of about resolution x resolution pixels, whose ratio is nearest to that of a size."""
    found = [_sides(ratio, resolution) for ratio in RATIOS]
    return min(found, key=lambda sides: abs(sides[0] / sides[1] - size[0] / size[1]))


def _sides(ratio: float, resolution: int) -> tuple[int, int]:
    """Multiples of STRIDE, reckoned from the width and from the height; those nearer to the ratio, then to the area."""
    area = resolution**2

    def up(side: float) -> int:
        return max(STRIDE, round(side / STRIDE) * STRIDE)

    width, height = up(math.sqrt(area * ratio)), up(math.sqrt(area / ratio))
    ways = (width, up(width / ratio)), (up(height * ratio), height)
    return min(ways, key=lambda sides: (abs(sides[0] / sides[1] - ratio), abs(sides[0] * sides[1] - area)))


def cropped(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """The largest middle of a picture that has the ratio of these sides, resized to them."""
    (width, height), ratio = image.size, sides[0] / sides[1]
    w, h = round(math.sqrt(width * height * ratio)), round(math.sqrt(width * height / ratio))
    if w > width or h > height:
        w, h = (width, round(width / ratio)) if width / height < ratio else (round(height * ratio), height)
    w, h = max(1, min(w, width)), max(1, min(h, height))
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize(sides, Image.Resampling.BICUBIC)


def centre(image: Image.Image, unit: int) -> Image.Image:
    """The middle of a picture whose sides are multiples of a unit."""
    w, h = (side // unit * unit for side in image.size)
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def planned_input(
    size: tuple[int, int], frames: int, config: LanceConfig, resolutions: Sequence[int], where: str
) -> LanceInput:
    """How a picture of (width, height), or a video of so many such frames, is read, without its pixels. resolutions: of the VAE
    and of the ViT. Raises ValueError where it exceeds what the model takes."""
    c, (vae, vit) = config.vit, (bucket(size, resolution) for resolution in resolutions)
    canvas = LanceCanvas(
        config, ((frames - 1) // config.vae.frames + 1, *(s // config.token_pixels for s in vae[::-1]))
    )
    check_canvas(canvas, where, where)
    columns, rows = (side // c.merged_pixels * c.spatial_merge_size for side in vit)
    if not rows or not columns:
        raise ValueError(
            f"{where}: resolution_vit={resolutions[1]} makes it {vit[0]}x{vit[1]} pixels; use a larger one"
        )
    return LanceInput(config, size[::-1], canvas, (-(-frames // c.temporal_patch_size), rows, columns))


def read_input(
    frames: Iterable[Image.Image],
    size: tuple[int, int],
    count: int,
    config: LanceConfig,
    resolutions: Sequence[int],
    where: str,
) -> LanceInput:
    """Brings a picture of `size` (width, height), or a video's `count` frames, to the sides that each encoder takes, one after the
    other. Raises as `planned_input`."""
    planned = planned_input(size, count, config, resolutions, where)
    vae, vit = (bucket(size, resolution) for resolution in resolutions)
    read = [
        (cropped(frame, vae), centre(cropped(frame, vit), config.vit.merged_pixels)) for frame in map(to_rgb, frames)
    ]
    return dataclasses.replace(planned, vae=[one for one, _ in read], vit=[other for _, other in read])


def check_canvas(canvas: LanceCanvas, sides: str, count: str) -> None:
    """Raises ValueError where there are more latents than the table of places has. sides, count: where those of the frames came
    from."""
    frames, height, width = canvas.frames, *canvas.size
    if canvas.grid[0] > FRAMES:
        raise ValueError(f"{count}: {frames} frames; allowed: at most {canvas.config.longest}")
    if max(canvas.grid[1:]) > SIDE:
        raise ValueError(
            f"{sides}: {height}x{width} pixels (height x width); allowed: at most {canvas.config.largest_size} a side"
        )
