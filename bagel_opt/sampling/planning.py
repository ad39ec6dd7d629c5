"""From a request to a plan: what the model is made to read, walking the inputs as the official code does."""

import dataclasses
import secrets

from bagel_opt import images
from bagel_opt.config import BagelConfig
from bagel_opt.images import Canvas, InputImage
from bagel_opt.lance.config import Config
from bagel_opt.options import DEFAULT_ROUNDS, DEFAULT_TOKENS, VIDEO, Options, described
from bagel_opt.request import Request
from bagel_opt.sampling.contexts import Block, Item, contexts, evaluated
from bagel_opt.sampling.flow import schedule
from bagel_opt.sampling.interleaved import Interleaved
from bagel_opt.sampling.lance import plan_lance
from bagel_opt.sampling.pictures import draw_noise, picture_size, read_image, size_to_give
from bagel_opt.sampling.plan import Plan
from bagel_opt.tokenizer import Tokenizer
from bagel_opt.videos import Video

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


def make_plan(request: Request, config: Config, tokenizer: Tokenizer) -> Plan | Interleaved:
    """Walks the inputs as the official code does and checks them against the model's tables. What the model recommends for the
    length of texts and the number of rounds counts, but is no wish of the user's: a profile may have room for less.

    Raises ValueError for a picture, a size, an option or a noise that the model cannot take.
    """
    options = request.options_over(config.generation)
    plan = PLANS[config.family](request, options, config, tokenizer)
    unasked = dict.fromkeys({"max_think_tokens", "max_rounds"} - request.given.keys())
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, **unasked))


def plan_bagel(request: Request, options: Options, config: BagelConfig, tokenizer: Tokenizer) -> Plan | Interleaved:
    asked = [name for name in described(VIDEO) if request.given.get(name) is not None]
    if options.output == "video" or asked or any(isinstance(item, Video) for item in request.inputs):
        what = f"output={options.output!r}" if options.output == "video" else asked[0] if asked else "video"
        raise ValueError(f"{what}: this model draws and reads pictures alone; load a Lance checkpoint for videos")
    config = config.reading(options)
    draws = options.output != "text"
    items: list[Item] = []
    inputs: list[InputImage] = []

    def text(content: str) -> Block:
        ids = tokenizer.block(content)
        return Block("text", len(ids), ids)

    for index, item in enumerate(request.inputs):
        if isinstance(item, str):
            items.append(text(item))
        else:
            items.append(len(inputs))
            inputs.append(item if isinstance(item, InputImage) else read_image(item, config, f"inputs[{index}]"))
    first = [text(prompt) for prompt in opening(options)]
    negative = None if options.negative_prompt is None else text(options.negative_prompt)
    max_tokens = DEFAULT_TOKENS if options.max_think_tokens is None else options.max_think_tokens
    steps = schedule(options.num_timesteps, options.timestep_shift, options.cfg_interval) if draws else []
    if options.output == "interleaved":
        if options.seed is None:
            options = dataclasses.replace(options, seed=secrets.randbits(63))
        rounds = DEFAULT_ROUNDS if options.max_rounds is None else options.max_rounds
        plan = Interleaved(options, config, first, items, inputs, negative, steps, rounds, max_tokens)
        plan.contexts()  # raises what is wrong with sizes
        return plan
    main, cfg_text, cfg_img = contexts(first, items, inputs, draws, negative)
    if not draws:
        return Plan(options, main, None, None, inputs, max_tokens=max_tokens)
    canvas = Canvas(config, images.latent_grid(*picture_size(options, inputs, config), config))
    with_text, with_img = evaluated(options, steps)
    noise, vae_noise = draw_noise(options, canvas, inputs, config)
    return Plan(
        options,
        main,
        cfg_text if with_text else None,
        cfg_img if with_img else None,
        inputs,
        steps,
        canvas,
        max_tokens,
        noise,
        vae_noise,
        size_to_give(options, inputs),
    )


PLANS = {"bagel": plan_bagel, "lance": plan_lance}  # by families


def opening(options: Options) -> list[str]:
    """What is read before the inputs."""
    found = [options.system_prompt]
    if options.think:
        official = THINK_IMAGE if options.output == "image" else THINK_TEXT
        found.append(official if options.think_prompt is None else options.think_prompt)
    return [prompt for prompt in found if prompt]
