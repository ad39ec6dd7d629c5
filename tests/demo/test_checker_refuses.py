"""What must not pass for a picture of the world."""

from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
from PIL import Image, ImageFilter
from scenes import OPEN, PALETTE, WHITE, canvas, coverage, every_single, noisy, polygon, regular, single
from scipy import ndimage

from bagel_opt.demo import world
from bagel_opt.demo.checker import read, shows
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, PLACES, SIDE, Scene, Thing, draw


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


def test_ghosts_and_blobs_do_not_pass(thorough):
    rng, pairs = Random(5), list(product(BACKGROUNDS, COLOURS.items()))
    blobs = {
        "ghost": (regular(90, 12), 0.25),
        "blot": (regular(7, 8, inner=4), 1),
        "dot": (regular(4, 3.5, turn=45), 1),  # 5 x 5 pixels
    }
    for background, (colour, rgb) in pairs if thorough else pairs[::3]:
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


def test_noise_does_not_pass(thorough):
    for seed in range(10 if thorough else 3):
        rng = np.random.default_rng(seed)
        even = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        normal = rng.normal(128, 40, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
        coarse = ndimage.zoom(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (8, 8, 1), order=0)
        for pixels in (even, normal, coarse):
            image = Image.fromarray(pixels)
            scene = read(image)
            assert not any(shows(scene, Scene((OPEN,) * n, None)) for n in range(6))
