"""From a request to Lance to a plan: the chat that its task is rendered as, and the positions of all that is read and drawn.

Facts of the official code that show here: the text-free branch keeps the positions that the whole chat has, while what is
drawn after it has those of the shortened chat; the caption is what is found first of its tokens, wherever that is.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bagel_opt.lance.config import LanceConfig
from bagel_opt.lance.pictures import LanceCanvas, LanceInput, bucket, check_canvas, read_input
from bagel_opt.options import DEFAULT_FRAMES, Options, described
from bagel_opt.request import Request
from bagel_opt.sampling.contexts import Block, evaluated
from bagel_opt.sampling.flow import schedule
from bagel_opt.sampling.pictures import draw_noise
from bagel_opt.sampling.plan import Plan
from bagel_opt.tokenizer import Tokenizer
from bagel_opt.videos import Video

# The official system texts, word for word: the model was trained with them. Those of questions came with the questions.
DRAW_IMAGE = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the objects and "
    "background:"
)
DRAW_VIDEO = (
    "Describe the video by detailing the color, quantity, visible text, shape, size, texture, spatial relationships and "
    "motion/camera movements of the objects and background:"
)
EDIT = (
    "Describe the key features of the input {noun} (color, shape, size, texture, objects, background), then explain how the "
    "user’s text instruction should alter or modify the {noun}. Generate a new {noun} that meets the user’s requirements while "
    "maintaining consistency with the original input where appropriate."
)
ASK = {
    "image": "Look at the image carefully and answer the question.",
    "video": "Watch the video carefully and answer the question.",
}
VIT_START = 1000  # of the ViT block's start marker, on the first axis, where something is drawn
DEFAULT_TOKENS = 256  # of an answer
RESOLUTIONS = {"image": (768, 672), "video": (640, 616)}  # VAE, ViT
LOWER = 512  # the official resolution below the first
WIDE = 16, 9  # of a video, where no size is asked for
FPS, SECONDS = 12, 6  # of a video that is read: how densely, and how much at most
WHOSE = (
    "a picture is one frame, an edit has its input's size and frames, a video that begins with a picture has its size"
)


@dataclass(frozen=True)
class Placed(Block):
    """The block of a picture or a video, whose tokens have positions on three axes: frame, row and column.

    at: of its start marker. grid: frames, rows and columns. pace: from frame to frame. patches: that are encoded at a time.
    """

    at: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, int, int] = (1, 1, 1)
    pace: int = 1
    patches: int = 0

    @property
    def room(self) -> int:
        return max(self.tokens, self.patches)

    @property
    def positions(self) -> int:
        """To the one after its end marker, which comes after its largest on any axis."""
        frames, rows, columns = self.grid
        return 3 + max((frames - 1) * self.pace, rows - 1, columns - 1)

    def placed(self, position: int, tokens: int) -> np.ndarray:
        """[3, tokens + 2], the markers first."""
        steps = np.array([self.pace, 1, 1])[:, None]
        found = np.zeros((3, tokens + 2), np.int64)
        found[:, 1] = self.positions - 1
        found[:, 2 : 2 + self.tokens] = 1 + steps * np.indices(self.grid).reshape(3, -1)
        return found + np.array(self.at)[:, None]


class Chat:
    """A chat's blocks, one after the other, each with its positions in the whole."""

    def __init__(self, tokenizer: Tokenizer, config: LanceConfig):
        self.tokenizer, self.config = tokenizer, config
        self.blocks: list[Block] = []
        self.position = 0

    def say(self, text: str) -> None:
        if ids := tuple(self.tokenizer.encode(text)):
            self.blocks.append(Block("text", len(ids), ids, start=self.position))
            self.position += len(ids)

    def show(self, kind: str, image: int, read: LanceInput, shifted: bool = False) -> None:
        """A picture as its ViT or VAE block."""
        join = self.config.vit.spatial_merge_size
        frames, rows, columns = read.vit_grid
        grid = (frames, rows // join, columns // join) if kind == "vit" else read.canvas.grid
        block = self.placed(kind, grid, VIT_START if shifted else None)
        self.blocks.append(dataclasses.replace(block, image=image, patches=rows * columns if kind == "vit" else 0))
        self.position += block.positions

    def placed(
        self, kind: str, grid: tuple[int, int, int], first: int | None = None, position: int | None = None
    ) -> Placed:
        """A picture's block that begins here, or at a position. first: where on the first axis, if elsewhere."""
        at = self.position if position is None else position
        length = grid[0] * grid[1] * grid[2] + 2
        return Placed(
            kind, length, at=(at if first is None else first, at, at), grid=grid, pace=self.config.vit.tokens_per_second
        )


def without(blocks: Sequence[Block], ids: tuple[int, ...]) -> tuple[list[Block], int]:
    """The blocks but for the first of these ids in a row, with the positions that they had, and the position where those were."""
    for place, block in enumerate(blocks):
        for at in range(len(block.ids) - len(ids) + 1):
            if block.ids[at : at + len(ids)] == ids:
                parts = [(block.ids[:at], block.start), (block.ids[at + len(ids) :], block.start + at + len(ids))]
                kept = [Block("text", len(part), part, start=start) for part, start in parts if part]
                return [*blocks[:place], *kept, *blocks[place + 1 :]], block.start + at
    raise AssertionError("the caption is a block of its own")


def plan_lance(request: Request, options: Options, config: LanceConfig, tokenizer: Tokenizer) -> Plan:
    """Raises ValueError for what the model has no task for, and for sizes that it cannot take."""
    check_options(request, options, config)
    options = dataclasses.replace(options, cfg_img_scale=1.0)  # there is no such branch
    text, shown, where = task_of(request, options)
    noun = "video" if isinstance(shown, Video) else "image"
    inputs = [] if shown is None else [read_shown(shown, options, config, where)]
    if options.output == "text":
        return asked(text, inputs, noun, options, config, tokenizer)
    return drawn(text, inputs, noun, options, config, tokenizer)


def check_options(request: Request, options: Options, config: LanceConfig) -> None:
    """Raises ValueError for what Lance has not, or this model was not trained for."""
    if options.output not in ("text", *config.draws):
        if options.output == "interleaved":
            raise ValueError(
                "output='interleaved': Lance answers with one text, picture or video; allowed: 'text', 'image', 'video'"
            )
        raise ValueError(
            f"output={options.output!r}: this model was trained to draw {config.draws[0]}s; load the other folder beside it"
        )
    known = described()
    for name in request.given:
        if name in config.without and request.given[name] != known[name].default:
            raise ValueError(f"{name}={request.given[name]!r:.60}: Lance has no such option; leave it out")


def task_of(request: Request, options: Options) -> tuple[str, "Image.Image | Video | None", str]:
    """A request's text, its picture or video, and where that was given. Raises ValueError for other inputs."""
    texts = [item for item in request.inputs if isinstance(item, str)]
    shown = [(f"inputs[{i}]", item) for i, item in enumerate(request.inputs) if not isinstance(item, str)]
    if len(texts) != 1 or len(shown) > 1:
        raise ValueError(
            f"inputs: {len(texts)} texts and {len(shown)} pictures or videos; Lance takes one text, and at most one picture or video"
        )
    where, item = shown[0] if shown else ("inputs", None)
    if options.output == "text" and item is None:
        raise ValueError("inputs: Lance answers questions about a picture or a video, and there is none")
    if options.output == "image" and isinstance(item, Video):
        raise ValueError("output='image': a video is edited into a video; use output='video'")
    return texts[0], item, "video" if isinstance(item, Video) else where


def read_shown(shown: "Image.Image | Video", options: Options, config: LanceConfig, where: str) -> LanceInput:
    """A picture, or the frames of a video that the official code reads, in the sizes that the encoders take."""
    noun = "video" if isinstance(shown, Video) or options.output == "video" else "image"
    asked = options.resolution_vae, options.resolution_vit
    resolutions = [own if one is None else one for one, own in zip(asked, RESOLUTIONS[noun], strict=True)]
    if options.resolution_vae is None and max(bucket(shown.size, resolutions[0])) > config.largest_size:
        resolutions[0] = LOWER  # so wide a picture would be beyond the table of places
    numbers = frame_numbers(shown) if isinstance(shown, Video) else [0]
    frames = shown.pick(numbers) if isinstance(shown, Video) else [shown]
    return read_input(frames, shown.size, len(numbers), config, resolutions, where)


def frame_numbers(video: Video) -> list[int]:
    """Those that are read: of up to SECONDS, FPS a second, 4 n + 1 of them, spread over the whole video. Raises ValueError."""
    count = round(FPS * min(video.count / max(1, round(video.fps)), SECONDS))
    count = count - 3 if count % 4 == 0 else count // 4 * 4 + 1
    if count < 1:
        raise ValueError(
            f"video: {video.count} frames at {video.fps:g} a second are too short; a tenth of a second is the least, so give more"
        )
    return [int(number) for number in np.linspace(0, video.count - 1, count)]


def asked(
    question: str, inputs: list[LanceInput], noun: str, options: Options, config: LanceConfig, tokenizer: Tokenizer
) -> Plan:
    """The plan of a question about a picture or a video."""
    chat = Chat(tokenizer, config)
    chat.say(f"<|im_start|>system\n{system(options, ASK[noun])}<|im_end|>\n<|im_start|>user\n")
    chat.show("vit", 0, inputs[0])
    chat.say(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    *blocks, last = chat.blocks
    *ids, after = last.ids  # the last token is what the answer is written after
    blocks.append(dataclasses.replace(last, ids=tuple(ids), length=len(ids)))
    most = DEFAULT_TOKENS if options.max_think_tokens is None else options.max_think_tokens
    return Plan(options, blocks, None, None, inputs, max_tokens=most + 1, after=after)


def drawn(
    caption: str, inputs: list[LanceInput], noun: str, options: Options, config: LanceConfig, tokenizer: Tokenizer
) -> Plan:
    """The plan of a picture or a video, from a text alone, from a picture that it begins with, or from one that is edited."""
    edits = bool(inputs) and noun == options.output
    chat, canvas = Chat(tokenizer, config), canvas_of(options, inputs, edits, config)
    own = EDIT.format(noun=noun) if edits else DRAW_VIDEO if options.output == "video" else DRAW_IMAGE
    chat.say(f"<|im_start|>system\n{system(options, own)}<|im_end|>\n<|im_start|>user\n")
    place = None
    if edits:
        chat.show("vit", 0, inputs[0], shifted=True)
        place = chat.position  # what is drawn lies on the source
        chat.show("vae", 0, inputs[0])
    chat.say(caption)
    chat.say("<|im_end|>\n<|im_start|>assistant\n")
    main, found = chat.blocks, tuple(tokenizer.encode(caption))
    cfg_text, shift = main, 0
    if found:
        cfg_text, at = without(main, found)
        shift = len(found) if place is None or at < place else 0
    place = chat.position if place is None else place
    steps = schedule(options.num_timesteps + 1, options.timestep_shift, options.cfg_interval)
    noise, vae_noise = draw_noise(options, canvas, inputs, config)
    return Plan(
        options,
        main,
        cfg_text if evaluated(options, steps)[0] else None,
        None,
        inputs,
        steps,
        canvas,
        noise=noise,
        vae_noise=vae_noise,
        resized=inputs[0].original if options.size and edits else None,
        targets=tuple(chat.placed("vae", canvas.grid, position=where) for where in (place, place - shift)),
        first_image=0 if inputs and not edits else None,
    )


def system(options: Options, own: str) -> str:
    return own if options.system_prompt is None else options.system_prompt


def canvas_of(options: Options, inputs: list[LanceInput], edits: bool, config: LanceConfig) -> LanceCanvas:
    """What is drawn: of the input's size, or of the size that is asked for. Raises ValueError."""
    if options.size is not None and not edits:
        raise ValueError(f"size={options.size!r}; allowed only for an edit, whose input's size it asks for")
    video = options.output == "video"
    unit, frames = config.token_pixels, DEFAULT_FRAMES if options.num_frames is None else options.num_frames
    for name, asked_for in (("height", inputs), ("width", inputs), ("num_frames", edits or not video)):
        if asked_for and getattr(options, name) is not None:
            raise ValueError(f"{name}={getattr(options, name)}: {WHOSE}; leave it out")
    if edits:
        return inputs[0].canvas
    height, width = inputs[0].size if inputs else (config.default_size,) * 2
    if video and not inputs:
        width, height = bucket(WIDE, RESOLUTIONS["video"][0])
    height, width = (own if one is None else one for one, own in ((options.height, height), (options.width, width)))
    for name, side in (("height", height), ("width", width)):
        if side % unit:
            raise ValueError(f"{name}={side}; allowed: a multiple of {unit} pixels")
    grid = ((frames - 1) // config.vae.frames + 1 if video else 1, height // unit, width // unit)
    check_canvas(canvas := LanceCanvas(config, grid), "height, width", "num_frames")
    return canvas
