"""Pictures of a request: those that go in, resized for both encoders; the one to draw, its size and its noise."""

import dataclasses

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.errors import reason
from bagel_opt.images import Canvas, InputImage
from bagel_opt.options import Options
from bagel_opt.sampling.flow import seeded_noise


def planned_image(size: tuple[int, int], config: BagelConfig, where: str) -> InputImage:
    """How an image of (width, height) is read, without its pixels. Raises ValueError where it exceeds a position table."""
    first = images.resized(size, config.vae_resize)
    vae, vit = images.resized(first, config.vae_resize), images.resized(first, config.vit_resize)
    vae_grid = images.latent_grid(vae[1], vae[0], config)
    vit_grid = vit[1] // config.vit.patch_size, vit[0] // config.vit.patch_size
    images.check_grid(*vae_grid, config.latent_side, config.token_pixels, where)
    images.check_grid(*vit_grid, config.vit_side, config.vit.patch_size, where)
    if (last := (vit_grid[0] - 1) * config.vit_side + vit_grid[1]) > config.vit.num_positions:
        raise ValueError(
            f"{where}: needs {last} places in the ViT's position table, which has {config.vit.num_positions}"
        )
    return InputImage(config, size[::-1], first[::-1], vae_grid, vit_grid)


def read_image(image: Image.Image, config: BagelConfig, where: str) -> InputImage:
    """Resizes an input image for both encoders. Raises ValueError where it exceeds a position table or cannot be read."""
    planned = planned_image(image.size, config, where)
    try:
        rgb = images.to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow decodes files only now, and raises many kinds for damaged ones
        raise ValueError(f"{where}: the picture cannot be read: {reason(error)}") from None
    first = images.resize(rgb, config.vae_resize)
    return dataclasses.replace(
        planned, vae=images.resize(first, config.vae_resize), vit=images.resize(first, config.vit_resize)
    )


def picture_size(options: Options, inputs: list[InputImage], config: BagelConfig) -> tuple[int, int]:
    """(height, width) to draw: what was asked for, else the last input image's, as it is read."""
    own = inputs[-1].size if inputs else (config.default_size,) * 2
    asked = options.height, options.width
    height, width = (size if size is not None else default for size, default in zip(asked, own, strict=True))
    for name, size in (("height", height), ("width", width)):
        if size % config.token_pixels:
            raise ValueError(f"{name}={size}; allowed: a multiple of {config.token_pixels} pixels")
    images.check_grid(
        *images.latent_grid(height, width, config), config.latent_side, config.token_pixels, "height, width"
    )
    return height, width


def size_to_give(options: Options, inputs: list[InputImage]) -> tuple[int, int] | None:
    """(height, width) to which the picture is resized once it is drawn; None: it is as drawn. Raises ValueError."""
    if options.size is None:
        return None
    if not inputs:
        raise ValueError(f"size={options.size!r}; allowed only with an input picture, whose size it asks for")
    return inputs[-1].original


def draw_noise(
    options: Options, canvas: Canvas, inputs: list[InputImage], config: BagelConfig
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The initial latents and each input image's posterior noise: those given, else from the seed.

    The official code on a GPU draws the initial latents first from the CPU generator; the posterior noise follows
    here, so that a seed means the same picture on every device.
    """
    shape = (canvas.tokens, config.latent_dim)
    vae_shapes = [image.canvas.noise_shape() for image in inputs]
    noise, *vae_noise = seeded_noise(options.seed, [shape, *vae_shapes])
    if options.noise is not None:
        noise = _given("noise", options.noise, shape)
    if options.vae_noise is not None:
        given = options.vae_noise if isinstance(options.vae_noise, list | tuple) else [options.vae_noise]
        if len(given) != len(inputs):
            raise ValueError(f"vae_noise has {len(given)} arrays; allowed: one per input image, here {len(inputs)}")
        vae_noise = [_given(f"vae_noise[{i}]", a, s) for i, (a, s) in enumerate(zip(given, vae_shapes, strict=True))]
    return noise, vae_noise


def _given(name: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor of any device and dtype
        value = value.detach().float().cpu()
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {type(value).__name__}; allowed: numbers of shape {list(shape)}") from None
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}; allowed: {list(shape)} for this picture")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds infinities or NaN; allowed: finite numbers")
    return array
