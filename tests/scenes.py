"""Scenes of the demo's world, and pictures that are like its own or not."""

import math
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from bagel_opt.demo import world
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIDE, SIZES, Scene, Thing, draw

FIELDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES}
PALETTE = COLOURS | BACKGROUNDS
OPEN = Thing(None, None, None, None)
WHITE, RED = BACKGROUNDS["white"], COLOURS["red"]
seeds = st.integers(0, 2**32 - 1)
scenes = st.builds(lambda seed, held_out: world.sample_scene(Random(seed), held_out), seeds, st.booleans())


def legible(scene):
    """What a picture of a scene can tell: no jitter, in reading order."""
    return Scene(tuple(replace(thing, dx=0, dy=0) for thing in scene.ordered), scene.background)


def single(shape="circle", colour="red", size="large", place="center", background="white"):
    return Scene((Thing(shape, colour, size, place),), background)


def every_single():
    """All shapes in all sizes, in red on white in the middle."""
    return [single(shape, size=size) for shape, size in product(SHAPES, SIZES)]


def canvas(coverage, colour=RED, background=WHITE):
    """A colour on a background, as a mask of the picture says."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    image.paste(colour, (0, 0), coverage)
    return image


def coverage(scene):
    """How much of each pixel the red things of a scene on white cover."""
    distance = np.abs(np.asarray(draw(scene), float) - WHITE).sum(-1)
    return Image.fromarray(np.rint(distance / distance.max() * 255).astype(np.uint8))


def polygon(*points, hole=()):
    """A mask of an antialiased polygon, in pixels from the picture's middle."""
    image = Image.new("L", (SIDE * 8, SIDE * 8))
    pen = ImageDraw.Draw(image)
    for corners, fill in ((points, 255), (hole, 0)):
        if corners:
            pen.polygon([((SIDE / 2 + x) * 8, (SIDE / 2 + y) * 8) for x, y in corners], fill=fill)
    return image.reduce(8)


def regular(corners, radius, turn=0.0, inner=None, squeeze=1.0):
    """Corners of a regular polygon with one at the top, or with an inner radius of a star."""
    steps = corners * (1 if inner is None else 2)
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(steps)]
    angles = [math.radians(turn) + math.tau * i / steps for i in range(steps)]
    return [(r * math.sin(a) * squeeze, -r * math.cos(a) / squeeze) for r, a in zip(radii, angles, strict=True)]


def noisy(image, rng, sigma=6):
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, sigma, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))
