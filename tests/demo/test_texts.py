"""What is said about the world is true of the pictures, and means one thing only."""

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from bagel_opt.demo import texts
from bagel_opt.demo.sheet import Cell, sheet
from bagel_opt.demo.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, distinct, draw, sample_scene

seeds = st.integers(0, 2**32).map(Random)


def named(thing):
    return thing.shape, thing.colour, thing.size, thing.place


def fits(wish, scene):
    """Whether the wish's things are the scene's, in some order, as far as they say."""
    left = list(scene.things)
    for wanted in sorted(wish.things, key=lambda thing: named(thing).count(None)):
        match = [t for t in left if all(w in (None, g) for w, g in zip(named(wanted), named(t), strict=True))]
        if not match:
            return False
        left.remove(match[0])
    return not left and wish.background in (None, scene.background)


@given(seeds, st.booleans())
def test_a_prompt_asks_for_what_the_scene_shows(rng, placed):
    scene = sample_scene(rng, held_out=False)
    text, wish = texts.sample_prompt(rng, scene, placed)
    assert fits(wish, scene)
    assert not placed or all(thing.place for thing in wish.things)
    for thing in wish.things:
        assert thing.shape in text.lower()
        assert thing.colour is None or thing.colour in text.lower()
        assert thing.place is None or any(words in text.lower() for words in texts.AT[thing.place])
        assert thing.size is None or any(word in text.lower() for word in texts.SIZE_WORDS[thing.size])
    assert wish.background is None or wish.background in text


@given(seeds, st.sampled_from(sorted(texts.EDIT_WORDS)), st.booleans())
def test_an_edit_changes_what_it_says_and_nothing_else(rng, kind, held_out):
    edit = texts.sample_edit(rng, held_out, kind)
    before, after = edit.before, edit.after
    assert distinct(after)
    assert (before.held_out or after.held_out) == held_out
    assert fits(edit.wish, after)
    gone = [t for t in before.things if t not in after.things]
    new = [t for t in after.things if t not in before.things]
    assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1), "swap": (2, 2), "background": (0, 0)}.get(
        kind, (1, 1)
    )
    assert (before.background != after.background) == (kind == "background")
    text = edit.text.lower()
    if kind == "recolour":
        assert new[0].colour in text
        assert replace(new[0], colour=gone[0].colour) == gone[0]
    elif kind in ("grow", "shrink"):
        assert (gone[0].size, new[0].size) == (("small", "large") if kind == "grow" else ("large", "small"))
        assert replace(new[0], size=gone[0].size) == gone[0]
    elif kind == "move":
        assert any(words.split(" ", 1)[1] in text for words in texts.AT[new[0].place])
        assert replace(new[0], place=gone[0].place) == gone[0]
    elif kind == "swap":
        assert {t.place for t in gone} == {t.place for t in new}
        assert {(t.colour, t.shape, t.size) for t in gone} == {(t.colour, t.shape, t.size) for t in new}
    elif kind == "background":
        assert after.background in text


@given(seeds)
def test_a_reference_means_one_thing(rng):
    scene = sample_scene(rng, held_out=False)
    thing = rng.choice(scene.things)
    words = texts.reference(rng, scene, thing)
    if words == "it":
        assert len(scene.things) == 1
        return
    colours = [name for name in COLOURS if name in words] or list(COLOURS)
    shapes = [name for name in SHAPES if name in words] or list(SHAPES)
    assert [t for t in scene.things if t.colour in colours and t.shape in shapes] == [thing]


@given(seeds, st.sampled_from(("colour", "shape", "count", "where", "describe", "background", "yes/no")))
def test_answers_are_true(rng, kind):
    """Read back from the words alone, by other rules than those that wrote them."""
    scene = sample_scene(rng, held_out=True)
    question = texts.sample_question(rng, scene, kind)
    text, answer = question.text.lower(), question.answer
    meant = list(scene.things)
    about = text if kind != "yes/no" or text.startswith("is there") else text.rsplit(" ", 1)[0]
    for field, names in (("shape", SHAPES), ("colour", COLOURS)):
        told = [name for name in names if f"{name}" in about]
        meant = [t for t in meant if not told or getattr(t, field) in told]
    if kind in ("colour", "shape"):
        if "the shape" in text and text.split("the shape ")[-1].startswith(("at", "in", "on")):
            meant = [t for t in scene.things if any(f"the shape {words}" in text for words in texts.AT[t.place])]
            exact = [t for t in meant if any(text.endswith((f"{w}?", f"{w} have?")) for w in texts.AT[t.place])]
            meant = exact or meant
        assert {getattr(t, kind) for t in meant} == {answer}
    elif kind == "count":
        assert answer == texts.NUMBERS[len(meant)]
    elif kind == "where":
        assert [texts.AT[t.place][0] for t in meant] == [answer]
    elif kind == "background":
        assert answer == scene.background
    elif kind == "describe":
        assert all(
            all(word in answer for word in (t.colour, t.shape, t.size, texts.AT[t.place][0])) for t in scene.things
        )
        assert answer.endswith(f"{scene.background} background")
    elif text.startswith("is there"):
        assert answer == ("yes" if meant else "no")
    else:
        sizes = [size for size, words in texts.SIZE_WORDS.items() if text.rstrip("?").split()[-1] in words]
        if sizes:
            assert answer == ("yes" if scene_thing(scene, text).size == sizes[0] else "no")
        else:
            said = {p for p, words in texts.AT.items() if any(text.endswith(f"{w}?") for w in words)}
            assert answer == ("yes" if scene_thing(scene, text).place in said else "no")


def scene_thing(scene, text):
    """The one thing that a question's subject means."""
    subject = text.removeprefix("is ")
    for words in (w for group in texts.AT.values() for w in group):
        subject = subject.removesuffix(f"{words}?")
    if subject.startswith("it "):
        return scene.things[0]
    found = [t for t in scene.things if f"the {t.colour} {t.shape}" in subject]
    found = found or [t for t in scene.things if f"the {t.shape}" in subject or f"the {t.colour} shape" in subject]
    assert len(found) == 1
    return found[0]


def test_questions_are_balanced():
    rng = Random(0)
    answers = [texts.sample_question(rng, sample_scene(rng, False), "yes/no").answer for _ in range(2000)]
    assert 900 < answers.count("yes") < 1100


@given(seeds)
def test_no_question_of_training_names_a_held_out_combination(rng):
    scene = sample_scene(rng, held_out=False)
    question = texts.sample_question(rng, scene, "yes/no")
    for name, words in texts.AT.items():
        if not question.text.startswith(("is there", "Is there")) and question.text.endswith(
            tuple(f"{w}?" for w in words)
        ):
            assert not replace(scene_thing(scene, question.text.lower()), place=name).held_out


def test_every_word_of_the_world_is_used():
    said = " ".join(texts.corpus(Random(0), 800))
    for word in (*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *PLACES):
        assert word in said


def test_a_sheet_shows_its_pictures_in_rows():
    picture = draw(sample_scene(Random(0), False))
    page = sheet({"Above": [Cell(picture, "a word"), Cell(None, "none")], "": [Cell(None, "x"), Cell(picture)]})
    wide, high = page.size
    assert wide == 12 + 2 * (128 + 12)
    assert high > 128 + 128
    found = [
        (x, y)
        for x in range(wide - 127)
        for y in range(0, high - 127, 1)
        if page.getpixel((x, y)) == picture.getpixel((0, 0))
    ]
    inside = [at for at in found if page.crop((*at, at[0] + 128, at[1] + 128)).tobytes() == picture.tobytes()]
    assert len(inside) == 2
    assert inside[0][0] < inside[1][0]
    assert inside[0][1] < inside[1][1]
