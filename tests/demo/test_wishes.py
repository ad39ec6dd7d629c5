"""Comparing what a picture shows with a wish."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from scenes import FIELDS, OPEN, scenes
from support import examples

from bagel_opt.demo.checker import read, shows
from bagel_opt.demo.world import BACKGROUNDS, PLACES, Scene, Thing, draw


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
