"""The demo's synthetic world."""

from itertools import combinations, product
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    FIELDS,
    scenes,
    seeds,
)

from bagel_opt.demo import world
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, JITTER, PLACES, SHAPES, SIDE, Thing, draw


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
