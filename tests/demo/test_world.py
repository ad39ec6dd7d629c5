"""The demo's synthetic world, and the checker that reads its pictures."""

import io
import math
from dataclasses import replace
from itertools import combinations, product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from support import examples

from bagel_opt.demo import world
from bagel_opt.demo.checker import read, shows
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, JITTER, PLACES, SHAPES, SIDE, SIZES, Scene, Thing, draw

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


# ---- the world


def test_one_combination_in_eight_is_held_out_and_training_sees_all_pairs():
    combinations_ = [Thing(shape, colour, None, place) for shape, colour, place in product(SHAPES, COLOURS, PLACES)]
    seen = [thing for thing in combinations_ if not thing.held_out]
    assert (len(combinations_), len(seen)) == (360, 315)
    for one, other in combinations(("shape", "colour", "place"), 2):
        pairs = {(getattr(thing, one), getattr(thing, other)) for thing in seen}
        assert pairs == set(product(FIELDS[one], FIELDS[other]))


@given(seeds, st.booleans(), st.sampled_from([(1,), (2,), (1, 2, 2, 3, 3)]))
def test_sampled_scenes_keep_their_promises(seed, held_out, counts):
    scene = world.sample_scene(Random(seed), held_out, counts)
    assert scene == world.sample_scene(Random(seed), held_out, counts)
    assert any(thing.held_out for thing in scene.things) == held_out
    assert len(scene.things) in counts
    assert scene.background in BACKGROUNDS
    assert len({thing.place for thing in scene.things}) == len(scene.things)
    assert len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)
    for thing in scene.things:
        assert all(getattr(thing, field) in values for field, values in FIELDS.items())
        assert max(abs(thing.dx), abs(thing.dy)) <= JITTER


@given(scenes)
def test_pictures_are_of_one_size_and_always_the_same(scene):
    image = draw(scene)
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE)) == ("RGB", (128, 128))
    world.mask.cache_clear()
    assert draw(scene).tobytes() == image.tobytes()
    assert image.getpixel((0, 0)) == BACKGROUNDS[scene.background]  # no thing reaches the corners
    # Every thing is in its own cell, whose walls stay bare.
    pixels = np.asarray(image)
    assert (pixels[:, [42, 85]] == BACKGROUNDS[scene.background]).all()
    assert (pixels[[42, 85]] == BACKGROUNDS[scene.background]).all()


# ---- reading pictures


def blurred(image, rng):
    return image.filter(ImageFilter.GaussianBlur(0.7))


def noisy(image, rng, sigma=6):
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, sigma, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))


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


def test_every_thing_at_every_place_on_every_background_is_read():
    """Several to a picture, as many as leave most of it bare."""
    rng = Random(1)
    layouts = [("small", PLACES), *(("large", PLACES[column::3]) for column in range(3))]
    for shape, colour, background, (size, places) in product(SHAPES, COLOURS, BACKGROUNDS, layouts):
        jitter = [(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)) for _ in places]
        things = [Thing(shape, colour, size, place, *off) for place, off in zip(places, jitter, strict=True)]
        scene = Scene(tuple(things), background)
        assert read(draw(scene)) == legible(scene)


@pytest.mark.parametrize(
    "distort",
    [None, blurred, noisy, jpeg_in_full_colour, resampled, off_colour, generated],
    ids=lambda f: f and f.__name__,
)
def test_random_scenes_are_read(distort):
    rng = Random(2)
    for i in range(250):
        scene = world.sample_scene(rng, held_out=i % 2 == 0)
        image = draw(scene)
        assert read(distort(image, rng) if distort else image) == legible(scene)


def test_where_jpeg_halves_the_resolution_of_colour_little_is_unclear_and_nothing_mistaken():
    """It blurs small stars and rings that differ from the background in colour only, and tinges holes."""
    rng, exact = Random(3), 0
    for i in range(250):
        scene = legible(world.sample_scene(rng, held_out=i % 2 == 0))
        got = read(jpeg(draw(scene), rng))
        exact += got == scene
        assert got.background == scene.background
        for thing in got.things:
            assert None in thing.key or thing in scene.things
    assert exact >= 0.97 * 250


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


# ---- what must not pass


def passes(image, scene):
    """Whether a picture passes for a scene, or for as many things of any kind on any background."""
    seen = read(image)
    return shows(seen, scene) or shows(seen, Scene((OPEN,) * len(scene.things), None))


def test_grey_mush_does_not_pass():
    for scene in every_single():
        assert passes(draw(scene), scene)
        grey = draw(scene).convert("L").convert("RGB")
        assert not passes(grey, scene)
        assert not passes(draw(scene).filter(ImageFilter.GaussianBlur(12)), scene)
        for shade in ((128, 128, 128), (120, 110, 100), (90, 95, 90)):
            assert not passes(canvas(coverage(scene), shade), scene)
    assert not shows(Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), single(background=None))


def test_halves_of_two_colours_pass_for_neither():
    """Neither mixed (half of red and yellow is orange, and may pass for it) nor side by side."""
    mask = coverage(single())
    for (one, first), (other, second) in product(COLOURS.items(), PALETTE.items()):
        if one == other:
            continue
        background = next(name for name in BACKGROUNDS if name != other)
        mixed = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
        scene = read(canvas(mask, mixed, BACKGROUNDS[background]))
        assert (scene.background, len(scene.things)) == (background, 1)
        assert scene.things[0].colour not in (one, other)
        if other in COLOURS:
            patched = canvas(mask, first, WHITE)
            patched.paste(canvas(mask, second, WHITE).crop((0, 0, SIDE, 60)))
            assert not passes(patched, single(colour=one))
            assert not shows(patched, single(colour=other))


def test_backgrounds_of_no_or_two_colours_have_no_name():
    for colour in ((200, 200, 200), (90, 90, 95), (250, 245, 228), (60, 200, 60), (255, 200, 160)):
        assert read(canvas(coverage(single()), background=colour)) == single(background=None)
    for one, other in product(BACKGROUNDS.values(), repeat=2):
        if one != other:
            ramp = np.linspace(one, other, SIDE).round().astype(np.uint8)
            scene = read(Image.fromarray(np.broadcast_to(ramp, (SIDE, SIDE, 3))))
            assert scene.background is None or scene.things
            assert not any(shows(scene, Scene((OPEN,) * n, None)) for n in range(1, 6))
    grainy = noisy(draw(single(background="gray")), Random(4), sigma=20)
    assert read(grainy).background is None
    # Too weak to be things: a stain, and a picture that grows darker downwards.
    stain = canvas(polygon(*regular(90, 25)), (240, 228, 228))
    assert read(stain).background is None
    beside = canvas(coverage(single()))
    beside.paste((236, 222, 222), (0, 0), polygon(*((x + 28, y) for x, y in regular(90, 9))))
    assert read(beside) == single(background=None)
    darker = np.linspace(175, 125, SIDE)[:, None, None] + np.zeros((SIDE, SIDE, 3))
    assert read(Image.fromarray(darker.astype(np.uint8))).background is None


def test_smeared_things_do_not_pass():
    for scene, axis in product(every_single(), (0, 1)):
        smeared = ndimage.uniform_filter1d(np.asarray(draw(scene), float), 16, axis=axis)
        assert not passes(Image.fromarray(smeared.round().astype(np.uint8)), scene)


def test_half_drawn_things_do_not_pass():
    for scene, share, turns in product(every_single(), (0.4, 0.5), range(4)):
        pixels = np.array(draw(scene))
        rows = np.flatnonzero((pixels != WHITE).any((1, 2)))
        columns = np.flatnonzero((pixels != WHITE).any((0, 2)))
        ends = columns if turns % 2 else rows
        cut = round(ends[0] + share * len(ends)) if turns < 2 else round(ends[-1] + 1 - share * len(ends))
        half = slice(0, cut) if turns < 2 else slice(cut, None)
        pixels[(slice(None), half) if turns % 2 else half] = WHITE
        image = Image.fromarray(pixels)
        assert not shows(image, scene)
        # The upper part of a triangle is one, if a smaller.
        assert not passes(image, scene) or (scene.things[0].shape, turns) == ("triangle", 2)


def test_ghosts_and_blobs_do_not_pass():
    rng = Random(5)
    blobs = {
        "ghost": (regular(90, 12), 0.25),
        "blot": (regular(7, 8, inner=4), 1),
        "dot": (regular(4, 3.5, turn=45), 1),  # 5 x 5 pixels
    }
    for background, (colour, rgb) in product(BACKGROUNDS, COLOURS.items()):
        scene = world.sample_scene(rng, held_out=False)
        taken = {thing.place for thing in scene.things}
        scene = replace(scene, background=background)
        place = rng.choice([place for place in PLACES if place not in taken])
        x, y = world.middle(Thing(None, colour, None, place))
        for points, strength in blobs.values():
            mask = polygon(*((px + x - SIDE / 2, py + y - SIDE / 2) for px, py in points))
            image = draw(scene)
            image.paste(rgb, (0, 0), mask.point(lambda value, strength=strength: round(value * strength)))
            assert not passes(image, scene)
            got = read(image)
            assert len(got.things) == len(scene.things) + 1 or (strength < 1 and got.background is None)
            # Nor as another thing, but for the dot: it is square.
            assert not shows(got, Scene((OPEN,) * len(got.things), None)) or points is blobs["dot"][0]


def test_specks_are_forgiven_if_few():
    rng, scene = Random(6), single(place="left")
    image = draw(scene)
    for _ in range(5):
        x, y = rng.randrange(66, 126), rng.randrange(126)
        image.paste((60, 60, 60), (x, y, x + 2, y + 2))
    assert shows(image, scene)
    for x, y in product(range(64, 126, 6), range(0, 126, 6)):
        image.paste((60, 60, 60), (x, y, x + 2, y + 2))
    assert read(image) == replace(scene, background=None)


def test_noise_does_not_pass():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        even = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        normal = rng.normal(128, 40, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
        coarse = ndimage.zoom(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (8, 8, 1), order=0)
        for pixels in (even, normal, coarse):
            image = Image.fromarray(pixels)
            scene = read(image)
            assert not any(shows(scene, Scene((OPEN,) * n, None)) for n in range(6))


# ---- comparing with a wish


def opened(scene, rng):
    """A wish that leaves some fields open and names things in some order."""
    things = [
        Thing(*(value if rng.random() < 0.6 else None for value in thing.key))
        for thing in rng.sample(scene.things, len(scene.things))
    ]
    return Scene(tuple(things), rng.choice((scene.background, None)))


def changed(scene):
    """All wishes with another value in one field."""
    for thing in scene.things:
        for field, values in FIELDS.items():
            for value in values:
                if value != getattr(thing, field):
                    yield scene.swap(thing, replace(thing, **{field: value}))
    for background in BACKGROUNDS:
        if background != scene.background:
            yield replace(scene, background=background)


@examples(40)
@given(scenes, st.randoms(use_true_random=False))
def test_a_picture_shows_its_scene_and_no_other(scene, rng):
    image = draw(scene)
    assert shows(image, scene)
    assert shows(image, opened(scene, rng))
    assert not shows(image, rng.choice(list(changed(scene))))
    seen, thing = read(image), rng.choice(scene.things)
    assert not any(shows(seen, wish) for wish in changed(scene))
    for wish in (scene.swap(thing), scene.swap(thing, thing, thing), scene.swap(thing, thing, OPEN)):
        assert not shows(seen, wish)


@given(scenes, st.randoms(use_true_random=False))
def test_a_scene_shows_itself_and_no_other(scene, rng):
    assert shows(scene, scene)
    assert shows(scene, opened(scene, rng))
    assert not any(shows(scene, wish) or shows(wish, scene) for wish in changed(scene))
    assert not shows(scene, Scene((), None))


def test_things_and_wishes_are_matched_one_to_one_in_any_order():
    red_circle, red_square = Thing("circle", "red", "small", "left"), Thing("square", "red", "small", "top")
    scene = Scene((red_circle, red_square), "white")
    red, circle = replace(OPEN, colour="red"), replace(OPEN, shape="circle")
    for things in ((red, circle), (circle, red), (red, red), (OPEN, circle)):
        assert shows(scene, Scene(things, None))
    assert not shows(scene, Scene((circle, circle), None))


def test_what_has_no_name_fails():
    thing = Thing("circle", "red", "small", "left")
    wish = Scene((thing,), "white")
    for field in FIELDS:
        scene = wish.swap(thing, replace(thing, **{field: None}))
        assert not shows(scene, wish)
        assert shows(scene, Scene((OPEN,), None)) == (field in ("size", "place"))
    for background in ("white", None):
        assert shows(wish, replace(wish, background=background))
        assert not shows(replace(wish, background=None), replace(wish, background=background))


def test_many_things_fail_at_once():
    things = tuple(Thing("circle", "red", "small", place) for place in PLACES)
    assert shows(Scene(things[:5], "white"), Scene(things[:5], "white"))
    assert not shows(Scene(things[:6], "white"), Scene(things[:6], "white"))
