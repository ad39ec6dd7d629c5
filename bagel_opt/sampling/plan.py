"""What a request makes the model read: its contexts as blocks, and the room they need."""

import copy
import dataclasses
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.errors import ProfileError
from bagel_opt.profile import Profile
from bagel_opt.request import Options, Request
from bagel_opt.sampling.flow import FlowStep, schedule, seeded_noise
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
DEFAULT_TOKENS = 1000  # longest generated text where none is asked for
LEAST_TOKENS = 16  # a profile with less room for it is too small for the request


@dataclass(frozen=True)
class Block:
    """A text (its ids with start and end), or the VAE or ViT block of input image number `image`."""

    kind: str  # "text", "vae" or "vit"
    length: int  # slots that it takes, markers included
    ids: tuple[int, ...] = ()
    image: int = -1


@dataclass
class InputImage:
    """An input image, resized by the VAE rule and then, for each encoder, by that encoder's rule.

    The rule changes very long images again when it is applied twice; the picture to draw has the size of the first.
    """

    size: tuple[int, int]  # (height, width) after the first
    vae: Image.Image
    vit: Image.Image
    vae_grid: tuple[int, int]
    vit_grid: tuple[int, int]


@dataclass
class Plan:
    """A checked request: the blocks of its contexts, its pictures, its flow steps and its noise.

    main, cfg_text, cfg_img: blocks of the three contexts, before any thought. A guidance context is None where the
    request never evaluates it.
    """

    options: Options
    main: list[Block]
    cfg_text: list[Block] | None
    cfg_img: list[Block] | None
    images: list[InputImage]
    steps: list[FlowStep] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)  # latent tokens of the picture to draw
    max_tokens: int = 0  # longest text to generate, the start token included
    noise: np.ndarray | None = None
    vae_noise: list[np.ndarray] = field(default_factory=list)

    @property
    def draws(self) -> bool:
        return self.options.output == "image"

    @property
    def writes(self) -> bool:
        return self.options.think or not self.draws

    @property
    def thinks(self) -> bool:
        """Whether a thought joins the main context before the picture is drawn."""
        return self.draws and self.options.think

    def roles(self) -> tuple[int, int, int]:
        """Which of the request's rows main, cfg_text and cfg_img have. Contexts of equal content share one.

        Not with main, however, where a thought will join it, nor under TaylorSeer where guidance starts late: a branch
        is then behind main in its count of evaluations.
        """
        late = self.options.step_cache == "taylorseer" and not (self.steps and self.steps[0].guided)
        rows: list[list[Block] | None] = [None if self.thinks or late else self.main]

        def row(blocks: list[Block] | None) -> int:
            if blocks is None:
                return 0
            if blocks not in rows:
                rows.append(blocks)
            return rows.index(blocks)

        return 0, row(self.cfg_text), row(self.cfg_img)

    def contexts(self) -> int:
        """Rows that the request occupies."""
        return 1 + max(self.roles())

    def tokens(self, kind: str) -> int:
        """The longest block of a kind, without markers for images."""
        blocks = [b for blocks in (self.main, self.cfg_text, self.cfg_img) for b in blocks or [] if b.kind == kind]
        return max((b.length - (0 if kind == "text" else 2) for b in blocks), default=0)

    def latents(self) -> int:
        return max(self.tokens("vae"), self.grid[0] * self.grid[1])

    def peak(self, text: int, patches: int, latents: int) -> tuple[int, int]:
        """(slots that contexts fill at most, slots that the padded programs touch at most) for these chunk sizes.

        A thought is decoded and encoded again; it counts here with as many ids as were generated, which text
        keeps to. One that comes out longer than the room left is refused when it is there.
        """
        padded = {"text": text, "vit": patches + 2, "vae": latents + 2}
        filled = touched = 0
        for blocks in filter(None, (self.main, self.cfg_text, self.cfg_img)):
            length = 0
            for block in blocks:
                if block.kind == "text":
                    chunks = -(-block.length // text)
                    touched = max(touched, length + chunks * text)
                else:
                    touched = max(touched, length + padded[block.kind])
                length += block.length
            if blocks is self.main:
                if self.writes:
                    touched = max(touched, length + self.max_tokens)
                    if not self.draws:
                        length += self.max_tokens
                if self.thinks:
                    thought = self.max_tokens + 1
                    touched = max(touched, length + -(-thought // text) * text)
                    length += thought
            filled = max(filled, length)
            if self.draws:
                touched = max(touched, length + padded["vae"])
        return filled, max(filled, touched)

    def fits(self, profile: Profile) -> bool:
        try:
            copy.copy(self).check(profile)
        except ProfileError:
            return False
        return True

    def check(self, profile: Profile) -> None:
        """Raises ProfileError, naming the field, its value and the need, where the request does not fit.

        Where no longest text was asked for, it becomes what the profile has room for, down to LEAST_TOKENS.
        """
        sizes = profile.text, profile.patches, profile.latents
        while (
            self.options.max_think_tokens is None
            and self.max_tokens > LEAST_TOKENS
            and self.peak(*sizes)[1] > profile.slots
        ):
            self.max_tokens -= 1
        needs = {"patches": self.tokens("vit"), "latents": self.latents()}
        needs["slots"] = self.peak(*sizes)[1]
        for name, need in needs.items():
            if need > getattr(profile, name):
                raise ProfileError(
                    f"the request needs {name} of at least {need}, but profile {profile.name!r} has "
                    f"{name} = {getattr(profile, name)}; use a larger profile, or a smaller size, shorter text or fewer images"
                )


def make_plan(request: Request, config: BagelConfig, tokenizer: Tokenizer) -> Plan:
    """Walks the inputs as the official code does and checks them against the model's tables.

    Raises ValueError for a picture, a size or a noise that the model cannot take.
    """
    options = request.options
    draws = options.output == "image"
    main: list[Block] = []
    cfg_text: list[Block] = []
    cfg_img: list[Block] = []
    last_text: Block | None = None
    inputs: list[InputImage] = []

    def text(content: str) -> Block:
        ids = tokenizer.block(content)
        return Block("text", len(ids), ids)

    if options.think:
        main.append(text(THINK_IMAGE if draws else THINK_TEXT))
        cfg_img.append(main[0])
    for index, item in enumerate(request.inputs):
        if isinstance(item, str):
            last_text = text(item)
            cfg_text = list(main)
            main.append(last_text)
            cfg_img.append(last_text)
        else:
            image = read_image(item, config, f"inputs[{index}]")
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
    plan = Plan(
        options, main, cfg_text if guided else None, cfg_img if guided and options.cfg_img_scale > 1 else None, inputs
    )
    plan.steps, plan.grid, plan.max_tokens = steps, grid, max_tokens
    plan.noise, plan.vae_noise = draw_noise(options, grid, inputs, config)
    return plan


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


def fit_profile(plans: list[Plan], round_up: bool) -> Profile:
    """The smallest profile for these requests, for runtimes that take any shape.

    round_up: to coarser sizes, so that a compiled program is reused by the next requests.
    """

    def up(value: int, step: int) -> int:
        return -(-max(value, 1) // step) * step if round_up else max(value, 1)

    text = min(512, up(max(plan.tokens("text") for plan in plans), 64))
    patches = up(max(plan.tokens("vit") for plan in plans), 64)
    latents = up(max(plan.latents() for plan in plans), 64)
    base = Profile("fitted", min(8, sum(plan.contexts() for plan in plans)), 1, text, patches, latents)
    slots = max(slots_together(plans, base), max(plan.peak(text, patches, latents)[1] for plan in plans))
    # Ids of broken characters can come back from text as three each, and these shapes can still be chosen. The
    # price is attention over more masked slots.
    slots += 2 * max((plan.max_tokens for plan in plans if plan.thinks), default=0)
    return dataclasses.replace(base, slots=up(slots, 256))


def slots_together(plans: list[Plan], profile: Profile) -> int:
    """Slots with which these requests can share batches: while one is drawn, a program writes a padded image after
    what every other row holds; while one is written, a token."""
    filled = max(plan.peak(profile.text, profile.patches, profile.latents)[0] for plan in plans)
    return filled + (profile.latents + 2 if any(plan.draws for plan in plans) else 1)
