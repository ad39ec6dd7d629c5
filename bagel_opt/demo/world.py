"""A synthetic world of flat shapes on plain backgrounds, 128 x 128 pixels, drawn with Pillow.

One to three things per picture, each in a cell of its own of a 3 x 3 grid. No two things of a picture share both
colour and shape. One in eight combinations of shape, colour and place is held out: training never sees it, in
pictures or in texts, though it sees each colour with each shape, each shape at each place and each colour there.
"""

import functools
import math
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

SIDE = 128  # pixels of a picture
JITTER = 2  # pixels by which a thing may be off its cell's middle, either way
SUPERSAMPLING = 8

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (135, 50, 180),
    "pink": (250, 140, 190),
    "brown": (125, 75, 35),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (20, 20, 25),
    "gray": (150, 150, 155),
    "cream": (250, 238, 205),
    "sky blue": (175, 220, 250),
}
SIZES = {"small": 20, "large": 36}  # diameters in pixels
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One shape. None in a field of a wish leaves it open; dx and dy are pixels off the middle of its place."""

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None
    dx: int = 0
    dy: int = 0

    @property
    def held_out(self) -> bool:
        """Whether training never sees it. 3 and 5 share no divisor with 8, which spreads these evenly."""
        number = SHAPES.index(self.shape) + 3 * tuple(COLOURS).index(self.colour) + 5 * PLACES.index(self.place)
        return number % 8 == 0

    @property
    def key(self) -> tuple:
        """What is named of it; everything but the jitter."""
        return self.shape, self.colour, self.size, self.place


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or should show: in a wish, fields may be None."""

    things: tuple[Thing, ...]
    background: str | None

    @property
    def held_out(self) -> bool:
        return any(thing.held_out for thing in self.things)

    @property
    def ordered(self) -> list[Thing]:
        """In reading order, as descriptions name them."""
        return sorted(self.things, key=lambda thing: PLACES.index(thing.place))

    def swap(self, old: Thing, *new: Thing) -> "Scene":
        """The scene with other things, or none, in the place of one."""
        at = self.things.index(old)
        return replace(self, things=(*self.things[:at], *new, *self.things[at + 1 :]))


@dataclass(frozen=True)
class Edit:
    """An instruction, and the scene before and after."""

    kind: str
    text: str
    before: Scene
    after: Scene
    wish: Scene  # `after`, open where the instruction leaves it open


def sample_thing(rng: Random, place: str) -> Thing:
    jitter = rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)
    return Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES)), place, *jitter)


def sample_scene(rng: Random, held_out: bool, counts: tuple[int, ...] = (1, 2, 2, 3, 3)) -> Scene:
    """A random scene: without held-out combinations for training, else with at least one."""
    while True:
        places = rng.sample(PLACES, rng.choice(counts))
        scene = Scene(tuple(sample_thing(rng, place) for place in places), rng.choice(tuple(BACKGROUNDS)))
        if distinct(scene) and scene.held_out == held_out:
            return scene


def distinct(scene: Scene) -> bool:
    """Whether no two things share both colour and shape, or a place."""
    looks, places = {(t.colour, t.shape) for t in scene.things}, {t.place for t in scene.things}
    return len(looks) == len(places) == len(scene.things)


# ---- drawing


@functools.cache
def mask(shape: str, size: str) -> Image.Image:
    """The shape's coverage, antialiased, in a square of even side around its middle."""
    diameter = SIZES[size]
    side = diameter + 2
    image = Image.new("L", (side * SUPERSAMPLING,) * 2, 0)
    draw, middle, radius = ImageDraw.Draw(image), side * SUPERSAMPLING / 2, diameter * SUPERSAMPLING / 2

    def box(r: float) -> tuple[float, ...]:
        return middle - r, middle - r, middle + r - 1, middle + r - 1

    def points(*polar: tuple[float, float], down: float = 0) -> list[tuple[float, float]]:
        """Corners from (radius, degrees clockwise from the top)."""
        return [
            (middle + r * math.sin(math.radians(a)), middle + down - r * math.cos(math.radians(a))) for r, a in polar
        ]

    if shape == "square":
        draw.rectangle(box(radius * 0.88), fill=255)
    elif shape == "triangle":
        draw.polygon(points(*((radius * 1.15, a) for a in (0, 120, 240)), down=radius * 0.28), fill=255)
    elif shape == "star":
        corners = ((radius * 1.05 if i % 2 == 0 else radius * 0.45, 36 * i) for i in range(10))
        draw.polygon(points(*corners, down=radius * 0.05), fill=255)
    else:
        draw.ellipse(box(radius), fill=255)
        if shape == "ring":
            draw.ellipse(box(radius * 0.55), fill=0)
    return image.reduce(SUPERSAMPLING)


def middle(thing: Thing) -> tuple[int, int]:
    """The pixel (x, y) around which a thing is drawn."""
    row, column = divmod(PLACES.index(thing.place), 3)
    return round((column + 0.5) * SIDE / 3) + thing.dx, round((row + 0.5) * SIDE / 3) + thing.dy


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    for thing in scene.things:
        shape = mask(thing.shape, thing.size)
        (x, y), half = middle(thing), shape.width // 2
        image.paste(COLOURS[thing.colour], (x - half, y - half), shape)
    return image
