"""Reads off a picture of the synthetic world what it shows, by colour and geometry alone, without a network.

It allows for what a small generative model gets slightly wrong (soft edges, shades, noise, ringing), but names
nothing that is not clearly there: what it cannot name it reads as None, which does not pass for anything asked.
"""

import functools
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import color, filters, measure, morphology, transform

from bagel_opt.demo.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIDE, SIZES, Scene, Thing, mask

# Colours are compared by their distance in Lab, in which about 2 is just visible, and lengths are in pixels.
SMOOTHING = 0.5  # against the noise of single pixels
CHROMA = 1, 0.75, 0.75  # weights of L, a and b where edges are sought; the eye, JPEG and VAEs blur hues the most
VISIBLE = 12  # from the background; what is farther off is drawn. The world's colours are 36 and more, so weighted
SPECK = 12  # area; what is smaller is dropped. The smallest thing, a small star, has 140
HALO = 3  # around things, where a flat background may ring
TILE, UNEVEN, NOISY = 8, 8, 8  # how far a flat one may be off in the mean of a tile of this side; and by pixel, RMS
SHADE, CLEARER = 15, 0.7  # how far a colour may be off a named one; and as a share of how far it is off the next
DEEP = 0.7  # quantile of the distance from a thing's edge from which on its colour is taken; edges tinge the rest
PATCH, PATCHY = 25, 0.25  # palette colours are 31 and more apart; largest share of a thing's inside of another one
# How much the overlap (intersection over union) with a shape's outline may lack, if small: the more edge, the more.
SLACK = {"circle": 0.09, "square": 0.13, "triangle": 0.15, "star": 0.24, "ring": 0.27}
UNIT, WINDOW = 24, 64  # sides of the square that has the area of a normalised outline, and of the outline's picture
SIZE_OFF = 0.2  # share by which a diameter may be off; the sizes' ranges do not meet
PLACE_OFF = 15  # from the middle of a place; the next middle is 43 away
MOST = 5  # things to match in every order


def read(image: Image.Image) -> Scene:
    """What is where in which colour, in reading order, as far as it can be named."""
    if image.size != (SIDE, SIDE):
        raise ValueError(f"Pictures of the world are {SIDE} x {SIDE} pixels, not {image.width} x {image.height}")
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    lab = color.rgb2lab(pixels)
    ground = np.median(lab, axis=(0, 1))  # things cover less than a third of a picture
    distance = color.rgb2lab(filters.gaussian(pixels, SMOOTHING, channel_axis=-1)) - ground
    contrast = np.linalg.norm(distance * CHROMA, axis=-1)
    # Edges are where half the contrast beside them is left, which also parts things a few blurred pixels apart.
    drawn = contrast > np.maximum(VISIBLE, morphology.dilation(contrast, np.ones((5, 5))) / 2)
    drawn = morphology.remove_small_objects(drawn, max_size=SPECK - 1)
    things = [describe(region, lab) for region in measure.regionprops(measure.label(drawn, connectivity=1))]
    things.sort(key=lambda thing: PLACES.index(thing.place) if thing.place else len(PLACES))

    bare = ~morphology.dilation(drawn, morphology.disk(HALO))
    tiles = measure.block_reduce(distance * bare[..., None], (TILE, TILE, 1), np.mean)
    even = np.linalg.norm(tiles, axis=-1).max() <= UNEVEN
    flat = bare.any() and even and np.mean(contrast[bare] ** 2) <= NOISY**2
    return Scene(tuple(things), named(ground, BACKGROUNDS) if flat else None)


def describe(region: Any, lab: np.ndarray) -> Thing:
    """What a region of the picture, as of scikit-image's regionprops, is."""
    shades = lab[region.slice]
    depth = ndimage.distance_transform_edt(np.pad(region.image, 1))[1:-1, 1:-1]
    shade = np.median(shades[depth >= np.quantile(depth[region.image], DEEP)], axis=0)
    patch = np.linalg.norm(shades - shade, axis=-1) > PATCH
    plain = patch[depth > 1].sum() <= PATCHY * (depth > 1).sum()
    shape, diameter = outline(region.image)
    size = min(SIZES, key=lambda name: abs(SIZES[name] - diameter))
    top, left, bottom, right = region.bbox
    return Thing(
        shape,
        named(shade, COLOURS) if plain else None,
        size if abs(diameter / SIZES[size] - 1) <= SIZE_OFF else None,
        place((left + right) / 2, (top + bottom) / 2),
    )


def named(shade: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The name of the colour that a shade in Lab is clearly nearest to."""
    distances = np.linalg.norm(color.rgb2lab(np.array(list(palette.values())) / 255) - shade, axis=-1)
    first, second = np.argsort(distances)[:2]
    return list(palette)[first] if distances[first] <= min(SHADE, CLEARER * distances[second]) else None


def outline(image: np.ndarray) -> tuple[str | None, float]:
    """The shape whose outline, of the same area around the same middle, a mask overlaps with; and its diameter."""
    common = np.minimum(normalised(image), outlines()).sum((1, 2))
    overlaps = common / (2 * UNIT**2 - common)
    shape = SHAPES[overlaps.argmax()]
    diameter = SIZES["large"] * np.sqrt(image.sum() / coverage(shape).sum())
    clear = overlaps.max() >= 1 - SLACK[shape] * np.sqrt(SIZES["small"] / diameter)
    whole = measure.euler_number(image, connectivity=1) == (0 if shape == "ring" else 1)  # 1 less the number of holes
    return shape if clear and whole else None, diameter


def coverage(shape: str) -> np.ndarray:
    return np.asarray(mask(shape, "large")) / 255


@functools.cache
def outlines() -> np.ndarray:
    """Every shape, normalised."""
    return np.stack([normalised(coverage(shape)) for shape in SHAPES])


def normalised(image: np.ndarray) -> np.ndarray:
    """A mask with its centroid in the middle, scaled to an area of UNIT x UNIT."""
    image = image.astype(float)
    scale = np.sqrt(image.sum()) / UNIT
    shift = measure.centroid(image)[::-1] - scale * (WINDOW - 1) / 2
    return transform.warp(image, transform.AffineTransform(scale=scale, translation=shift), output_shape=(WINDOW,) * 2)


def place(x: float, y: float) -> str | None:
    """The place whose middle is near."""
    cell = SIDE / 3
    column, row = int(x // cell), int(y // cell)
    off = max(abs(x - (column + 0.5) * cell), abs(y - (row + 0.5) * cell))
    return PLACES[3 * row + column] if off <= PLACE_OFF else None


def shows(picture: Image.Image | Scene, wish: Scene) -> bool:
    """Whether a picture shows exactly the things of a wish, in which None leaves a field open.

    What has no name as read fails: a shape, a colour or a background (it may be stained) in any case, a size or a
    place where the wish has one.
    """
    scene = picture if isinstance(picture, Scene) else read(picture)
    if len(scene.things) != len(wish.things) or len(wish.things) > MOST:
        return False
    if scene.background is None or wish.background not in (None, scene.background):
        return False
    return any(all(map(fits, order, wish.things)) for order in permutations(scene.things))


def fits(thing: Thing, wish: Thing) -> bool:
    """Whether a thing has a name for its shape and colour, and everything that the wish names."""
    known = None not in (thing.shape, thing.colour)
    return known and all(asked in (None, got) for got, asked in zip(thing.key, wish.key, strict=True))
