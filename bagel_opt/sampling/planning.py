"""From a request to a plan: what the model is made to read, walking the inputs as the official code does."""

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.images import InputImage
from bagel_opt.options import DEFAULT_TOKENS, Options
from bagel_opt.request import Request
from bagel_opt.sampling.flow import schedule, seeded_noise
from bagel_opt.sampling.plan import Block, Plan
from bagel_opt.tokenizer import Tokenizer

# The official system prompts of think mode, word for word: the model was trained with them.
THINK_TEXT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
THINK_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)


def make_plan(request: Request, config: BagelConfig, tokenizer: Tokenizer) -> Plan:
    """Walks the inputs as the official code does and checks them against the model's tables.

    Raises ValueError for a picture, a size or a noise that the model cannot take.
    """
    options = request.options_over(config.generation)
    config = config.reading(options)
    draws = options.output == "image"
    main: list[Block] = []
    cfg_text: list[Block] = []
    cfg_img: list[Block] = []
    last_text: Block | None = None
    inputs: list[InputImage] = []

    def text(content: str) -> Block:
        ids = tokenizer.block(content)
        return Block("text", len(ids), ids)

    for prompt in opening(options):
        main.append(text(prompt))
        cfg_img.append(main[-1])
    for index, item in enumerate(request.inputs):
        if isinstance(item, str):
            last_text = text(item)
            cfg_text = list(main)
            main.append(last_text)
            cfg_img.append(last_text)
        else:
            image = item if isinstance(item, InputImage) else read_image(item, config, f"inputs[{index}]")
            inputs.append(image)
            kinds = {"vae": image.vae_grid, "vit": image.vit_grid} if draws else {"vit": image.vit_grid}
            main += [Block(kind, h * w + 2, image=len(inputs) - 1) for kind, (h, w) in kinds.items()]
            cfg_text = list(main)
    if options.negative_prompt is not None:
        negative = text(options.negative_prompt)
        place = next((i for i in reversed(range(len(main))) if main[i] is last_text), len(main))
        cfg_text = [*main[:place], negative, *main[place + 1 :]]
    max_tokens = DEFAULT_TOKENS if options.max_think_tokens is None else options.max_think_tokens
    if not draws:
        return Plan(options, main, None, None, inputs, max_tokens=max_tokens)

    height, width = picture_size(options, inputs, config)
    grid = images.latent_grid(height, width, config)
    steps = schedule(options.num_timesteps, options.timestep_shift, options.cfg_interval)
    guided = options.cfg_text_scale > 1 and any(step.guided for step in steps)
    noise, vae_noise = draw_noise(options, grid, inputs, config)
    return Plan(
        options,
        main,
        cfg_text if guided else None,
        cfg_img if guided and options.cfg_img_scale > 1 else None,
        inputs,
        steps,
        grid,
        max_tokens,
        noise,
        vae_noise,
    )


def opening(options: Options) -> list[str]:
    """What is read before the inputs."""
    found = [options.system_prompt]
    if options.think:
        official = THINK_IMAGE if options.output == "image" else THINK_TEXT
        found.append(official if options.think_prompt is None else options.think_prompt)
    return [prompt for prompt in found if prompt]


def read_image(image: Image.Image, config: BagelConfig, where: str) -> InputImage:
    """Resizes an input image for both encoders. Raises ValueError where it exceeds a position table."""
    first = images.resize(images.to_rgb(image), config.vae_resize)
    vae, vit = images.resize(first, config.vae_resize), images.resize(first, config.vit_resize)
    vae_grid = images.latent_grid(vae.height, vae.width, config)
    vit_grid = vit.height // config.vit.patch_size, vit.width // config.vit.patch_size
    images.check_grid(*vae_grid, config.latent_side, config.token_pixels, where)
    images.check_grid(*vit_grid, config.vit_side, config.vit.patch_size, where)
    if (last := (vit_grid[0] - 1) * config.vit_side + vit_grid[1]) > config.vit.num_positions:
        raise ValueError(
            f"{where}: needs {last} places in the ViT's position table, which has {config.vit.num_positions}"
        )
    return InputImage((first.height, first.width), vae, vit, vae_grid, vit_grid)


def picture_size(options: Options, inputs: list[InputImage], config: BagelConfig) -> tuple[int, int]:
    """(height, width) to draw: the last input image's, else what was asked for."""
    if inputs:
        height, width = inputs[-1].size
    else:
        height, width = (config.default_size if size is None else size for size in (options.height, options.width))
    for name, size in (("height", height), ("width", width)):
        if size % config.token_pixels:
            raise ValueError(f"{name}={size}; allowed: a multiple of {config.token_pixels} pixels")
    images.check_grid(
        *images.latent_grid(height, width, config), config.latent_side, config.token_pixels, "height, width"
    )
    return height, width


def draw_noise(
    options: Options, grid: tuple[int, int], inputs: list[InputImage], config: BagelConfig
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The initial latents and each input image's posterior noise: those given, else from the seed.

    The official code on a GPU draws the initial latents first from the CPU generator; the posterior noise follows
    here, so that a seed means the same picture on every device.
    """
    down = config.vae.downsample
    shape = (grid[0] * grid[1], config.latent_dim)
    vae_shapes = [(1, config.vae.z_channels, i.vae.height // down, i.vae.width // down) for i in inputs]
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
