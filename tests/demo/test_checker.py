"""The checker reads the world's pictures, however they were drawn."""

import io
from itertools import product
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scenes import (
    RED,
    WHITE,
    canvas,
    legible,
    noisy,
    polygon,
    regular,
    single,
)

from bagel_opt.demo import world
from bagel_opt.demo.checker import read
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, JITTER, PLACES, SHAPES, SIDE, SIZES, Scene, Thing, draw


def blurred(image, rng):
    return image.filter(ImageFilter.GaussianBlur(0.7))


def jpeg(image, rng, **how):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75, **how)
    return Image.open(file)


def jpeg_in_full_colour(image, rng):
    return jpeg(image, rng, subsampling=0)


def resampled(image, rng):
    return image.resize((112, 112), Image.Resampling.BICUBIC).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def off_colour(image, rng):
    shift = [rng.randint(-5, 5) for _ in range(3)]
    return Image.fromarray(np.clip(np.asarray(image, int) + shift, 0, 255).astype(np.uint8))


def generated(image, rng):
    """A little of everything, as a small model errs."""
    return off_colour(noisy(image.filter(ImageFilter.GaussianBlur(1)), rng, sigma=4), rng)


@pytest.fixture(scope="module")
def count(thorough):
    """How many scenes."""
    return 150 if thorough else 60


def test_every_thing_at_every_place_on_every_background_is_read(thorough):
    """Several to a picture, as many as leave most of it bare. In the first tier each thing at each place on one
    background, and on each background something."""
    rng = Random(1)
    layouts = [("small", PLACES), *(("large", PLACES[column::3]) for column in range(3))]
    for number, (shape, colour, (size, places)) in enumerate(product(SHAPES, COLOURS, layouts)):
        for background in BACKGROUNDS if thorough else [list(BACKGROUNDS)[number % len(BACKGROUNDS)]]:
            jitter = [(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)) for _ in places]
            things = [Thing(shape, colour, size, place, *off) for place, off in zip(places, jitter, strict=True)]
            scene = Scene(tuple(things), background)
            assert read(draw(scene)) == legible(scene)


@pytest.mark.parametrize(
    "distort",
    [None, blurred, noisy, jpeg_in_full_colour, resampled, off_colour, generated],
    ids=lambda f: f and f.__name__,
)
def test_random_scenes_are_read(distort, count):
    rng = Random(2)
    for i in range(count):
        scene = world.sample_scene(rng, held_out=i % 2 == 0)
        image = draw(scene)
        assert read(distort(image, rng) if distort else image) == legible(scene)


def test_where_jpeg_halves_the_resolution_of_colour_little_is_unclear_and_nothing_mistaken(count):
    """It blurs small stars and rings that differ from the background in colour only, and tinges holes."""
    rng, exact = Random(3), 0
    for i in range(count):
        scene = legible(world.sample_scene(rng, held_out=i % 2 == 0))
        got = read(jpeg(draw(scene), rng))
        exact += got == scene
        assert got.background == scene.background
        for thing in got.things:
            assert None in thing.key or thing in scene.things
    assert exact >= 0.97 * count


def test_shapes_are_named_however_they_were_drawn():
    """Not by the world's own masks, and of sizes that it does not draw."""
    for radius, size in ((9, "small"), (11, "small"), (16, "large"), (20, "large")):
        ring = regular(90, radius), regular(90, radius * 0.5)
        drawn = {
            "circle": polygon(*regular(90, radius)),
            "square": polygon(*regular(4, radius * 1.25, turn=45)),
            "triangle": polygon(*regular(3, radius * 1.15)),
            "star": polygon(*regular(5, radius * 1.05, inner=radius * 0.42)),
            "ring": polygon(*ring[0], hole=ring[1]),
        }
        for shape, mask in drawn.items():
            assert read(canvas(mask)) == single(shape, size=size), (shape, radius)


@pytest.mark.parametrize("radius", [10, 18])
def test_other_shapes_have_no_name(radius):
    circle = regular(90, radius)
    others = {
        "diamond": polygon(*regular(4, radius)),
        "turned square": polygon(*regular(4, radius * 1.2, turn=65)),
        "tilted square": polygon(*regular(4, radius * 1.2, turn=55)),
        "turned triangle": polygon(*regular(3, radius * 1.15, turn=180)),
        "pentagon": polygon(*regular(5, radius)),
        "ellipse": polygon(*regular(90, radius, squeeze=1.15)),
        "bar": polygon(*((x * 1.2, y / 1.2) for x, y in regular(4, radius * 1.2, turn=45))),
        "star of four": polygon(*regular(4, radius * 1.05, inner=radius * 0.45)),
        "star of six": polygon(*regular(6, radius * 1.05, inner=radius * 0.45)),
        "star short of a tip": polygon(
            *(p for i, p in enumerate(regular(5, radius * 1.05, inner=radius * 0.45)) if i != 4)
        ),
        "circle with a hole": polygon(*circle, hole=regular(90, radius * 0.18)),
        "thick ring": polygon(*circle, hole=regular(90, radius * 0.45)),
        "thin ring": polygon(*circle, hole=regular(90, radius * 0.75)),
        "open ring": polygon(*circle[3:-3], *reversed(regular(90, radius * 0.55)[3:-3])),
    }
    named = {name: thing.shape for name, mask in others.items() for thing in read(canvas(mask)).things if thing.shape}
    assert not named


def test_large_shapes_must_be_the_better_for_it():
    for size, shape in (("small", "star"), ("large", None)):
        radius = SIZES[size] / 2
        corners = regular(5, radius * 1.05, inner=radius * 0.45)
        corners[4] = tuple(value * 0.6 for value in corners[4])
        assert read(canvas(polygon(*corners))) == single(shape, size=size)


def test_sizes_and_places_in_between_have_no_name():
    (thing,) = read(canvas(polygon(*regular(90, 13.3)))).things
    assert thing == Thing("circle", "red", None, "center")
    for dx, dy in ((21, 0), (0, -21), (20, 20)):
        (thing,) = read(canvas(polygon(*((x + dx, y + dy) for x, y in regular(90, 18))))).things
        assert thing == Thing("circle", "red", "large", None)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_pictures_of_other_modes_are_read(mode):
    image = draw(single()).convert(mode)
    assert read(image) == read(image.convert("RGB"))


@pytest.mark.filterwarnings("error")
def test_a_picture_without_a_bare_spot_has_no_background():
    rows, columns = np.indices((SIDE, SIDE)) // 4
    board = np.where(((rows + columns) % 2 == 0)[..., None], WHITE, RED)
    assert read(Image.fromarray(board.astype(np.uint8))).background is None


def test_only_pictures_of_the_world_are_read():
    with pytest.raises(ValueError, match="128 x 128"):
        read(Image.new("RGB", (64, 128)))
