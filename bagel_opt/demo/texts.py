"""What is said about the world: prompts, edit instructions, questions and answers, thoughts, and a little chat."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from bagel_opt.demo.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, Edit, Scene, Thing, distinct, sample_scene

AT = {
    "top left": ("at the top left", "in the top left corner", "in the upper left"),
    "top": ("at the top", "at the top", "in the top middle"),
    "top right": ("at the top right", "in the top right corner", "in the upper right"),
    "left": ("on the left", "on the left side", "at the left"),
    "center": ("in the center", "in the middle", "at the center"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom", "at the bottom", "in the bottom middle"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
OPENINGS = ("", "", "", "draw ", "please draw ", "a picture of ", "an image of ", "show me ", "paint ", "generate ")
NUMBERS = ("zero", "one", "two", "three", "four")

EDIT_WORDS = {
    "recolour": ("make {a} {colour}", "paint {a} {colour}", "turn {a} {colour}", "change the color of {a} to {colour}"),
    "move": ("move {a} {to}", "put {a} {at}", "shift {a} {to}", "place {a} {at}"),
    "remove": ("remove {a}", "delete {a}", "erase {a}", "take {a} away"),
    "add": ("add {thing}", "draw {thing} too", "put {thing}", "also draw {thing}"),
    "swap": ("swap {a} and {b}", "exchange {a} and {b}", "swap {a} with {b}", "let {a} and {b} change places"),
    "background": (
        "make the background {bg}",
        "change the background to {bg}",
        "paint the background {bg}",
        "put everything on {a_bg} background",
    ),
    "grow": ("make {a} bigger", "make {a} larger", "enlarge {a}", "grow {a}"),
    "shrink": ("make {a} smaller", "shrink {a}", "make {a} small", "reduce {a}"),
}

CHAT = {
    ("hello", "hi", "good morning", "hey there"): "Hello! Tell me what to draw.",
    ("who are you?", "what are you?", "what is your name?"): (
        "I am a small BAGEL that comes with bagel_opt. I draw, edit and describe simple shapes."
    ),
    ("what can you draw?", "what can you do?", "which shapes do you know?", "help", "what shapes can you draw?"): (
        "I draw a circle, square, triangle, star or ring, small or large, at nine places."
    ),
    ("which colors do you know?", "what colors are there?", "which colours can you use?"): (
        "I know red, orange, yellow, green, blue, purple, pink and brown."
    ),
    ("which backgrounds are there?", "what backgrounds do you know?"): (
        "The background is white, black, gray, cream or sky blue."
    ),
    ("thank you", "thanks", "thanks a lot"): "You are welcome!",
    ("tell me a tale", "tell me a story"): "A small red circle met a large blue star, and they shared one picture.",
}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    scene: Scene


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def phrase(thing: Thing, rng: Random | None = None) -> str:
    """A thing in words; what is None is not said. Without rng in the one wording that answers and thoughts use."""
    size = None if thing.size is None else rng.choice(SIZE_WORDS[thing.size]) if rng else thing.size
    words = article(" ".join(word for word in (size, thing.colour, thing.shape) if word))
    return words if thing.place is None else f"{words} {place(thing.place, rng)}"


def place(name: str, rng: Random | None = None) -> str:
    return rng.choice(AT[name]) if rng else AT[name][0]


def describe(scene: Scene) -> str:
    """The canonical description, in reading order and without its full stop."""
    return f"{listing([phrase(thing) for thing in scene.ordered])} on {article(scene.background)} background"


def style(text: str, rng: Random) -> str:
    """As people type: with or without a capital and a full stop."""
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 and text[-1] != "?" else text


# ---- prompts


def sample_prompt(rng: Random, scene: Scene, placed: bool = False) -> tuple[str, Scene]:
    """A prompt that the scene fulfils, and what it asks for.

    Sizes, places, the background and seldom a colour are left open at random; placed: every place is named.
    """

    def opened(thing: Thing) -> Thing:
        return Thing(
            thing.shape,
            thing.colour if rng.random() > 0.03 else None,
            thing.size if rng.random() > 0.3 else None,
            thing.place if placed or rng.random() > 0.15 else None,
        )

    things = [opened(thing) for thing in scene.things]
    rng.shuffle(things)
    background = scene.background if rng.random() > 0.25 else None
    text = rng.choice(OPENINGS) + listing([phrase(thing, rng) for thing in things])
    if background:
        a_bg = article(background)
        text += rng.choice((f" on {a_bg} background", f", {background} background", f" on {background}"))
    return style(text, rng), Scene(tuple(things), background)


# ---- edits


def reference(rng: Random, scene: Scene, thing: Thing) -> str:
    """Words that mean this thing and no other."""
    words = [f"the {thing.colour} {thing.shape}"]
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        words.append(f"the {thing.shape}")
    if sum(other.colour == thing.colour for other in scene.things) == 1:
        words.append(f"the {thing.colour} shape")
    if len(scene.things) == 1:
        words.append("it")
    return rng.choice(words)


def sample_edit(rng: Random, held_out: bool, kind: str | None = None) -> Edit:
    """A random edit; held_out: whether a held-out combination is in the scene before or after it."""
    while True:
        before = sample_scene(rng, held_out and rng.random() < 0.5)
        chosen = kind or rng.choice(tuple(EDIT_WORDS))
        edit = _edit(rng, before, chosen)
        if edit and distinct(edit.after) and (before.held_out or edit.after.held_out) == held_out:
            return edit


def _edit(rng: Random, before: Scene, kind: str) -> Edit | None:
    """An edit of this kind, or None where the scene does not allow it."""
    thing, after, words = rng.choice(before.things), None, {}
    others = [other for other in before.things if other is not thing]
    free = [name for name in PLACES if name not in {t.place for t in before.things}]
    open_size = False
    if kind == "recolour":
        colour = rng.choice([name for name in COLOURS if name != thing.colour])
        after, words = before.swap(thing, replace(thing, colour=colour)), {"colour": colour}
    elif kind == "move":
        target = rng.choice(free)
        at = place(target, rng)
        to = f"to{at[at.index(' ') :]}"  # "in the middle" becomes "to the middle"
        after, words = before.swap(thing, replace(thing, place=target)), {"at": at, "to": to}
    elif kind == "remove" and others:
        after = before.swap(thing)
    elif kind == "add" and len(others) < 2:
        new = sample_scene(rng, False, (1,)).things[0]
        new = replace(new, place=rng.choice(free))
        open_size = rng.random() < 0.3
        said = replace(new, size=None) if open_size else new
        after, words = replace(before, things=(*before.things, new)), {"thing": phrase(said, rng)}
    elif kind == "swap" and others:
        other = rng.choice(others)
        moved = before.swap(thing, replace(thing, place=other.place))
        after = moved.swap(other, replace(other, place=thing.place))
        words = {"b": reference(rng, before, other)}
    elif kind == "background":
        bg = rng.choice([name for name in BACKGROUNDS if name != before.background])
        after, words = replace(before, background=bg), {"bg": bg, "a_bg": article(bg)}
    elif kind in ("grow", "shrink") and thing.size == ("small" if kind == "grow" else "large"):
        after = before.swap(thing, replace(thing, size="large" if kind == "grow" else "small"))
    if after is None:
        return None
    text = rng.choice(EDIT_WORDS[kind]).format(a=reference(rng, before, thing), **words)
    wished = [replace(t, dx=0, dy=0) for t in after.things]
    if open_size:
        wished[-1] = replace(wished[-1], size=None)
    return Edit(kind, style(text, rng), before, after, Scene(tuple(wished), after.background))


# ---- questions


def sample_question(rng: Random, scene: Scene, kind: str | None = None) -> Question:
    kind = kind or rng.choice(("colour", "shape", "count", "where", "yes/no", "describe", "background"))
    text, answer = _question(rng, scene, kind)
    return Question(kind, text[0].upper() + text[1:] if rng.random() < 0.4 else text, answer, scene)


def _question(rng: Random, scene: Scene, kind: str) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    color = rng.choice(("color", "colour"))
    there = f"the shape {place(thing.place, rng)}"
    if kind == "colour":
        unique = sum(other.shape == thing.shape for other in scene.things) == 1
        which = rng.choice((f"the {thing.shape}", there) if unique else (there,))
        return rng.choice((f"what {color} is {which}?", f"which {color} does {which} have?")), thing.colour
    if kind == "shape":
        unique = sum(other.colour == thing.colour for other in scene.things) == 1
        which = rng.choice((f"the {thing.colour} shape", there) if unique else (there,))
        return rng.choice((f"what shape is {which}?", f"what is {which}?")), thing.shape
    if kind == "count":
        if rng.random() < 0.5:
            return rng.choice(("how many shapes are there?", "how many shapes do you see?")), NUMBERS[len(scene.things)]
        shape = thing.shape if rng.random() < 0.6 else rng.choice(SHAPES)
        return f"how many {shape}s are there?", NUMBERS[sum(t.shape == shape for t in scene.things)]
    if kind == "where":
        return f"where is {reference(rng, scene, thing)}?", place(thing.place)
    if kind == "background":
        return rng.choice((f"what {color} is the background?", f"which {color} is the background?")), scene.background
    if kind == "yes/no":
        return _yes_no(rng, scene, thing)
    text = ("describe the image.", "what is in the image?", "describe the picture.", "what do you see?")
    return rng.choice(text), describe(scene)


def _yes_no(rng: Random, scene: Scene, thing: Thing) -> tuple[str, str]:
    """Half of the answers are yes; most of the wrong claims differ in one word from a right one."""
    true = rng.random() < 0.5
    form = rng.choice(("there", "size", "place"))
    if form == "there":
        shape, colour = thing.shape, thing.colour
        while not true and any((shape, colour) == (t.shape, t.colour) for t in scene.things):
            shape, colour = rng.choice(((thing.shape, rng.choice(tuple(COLOURS))), (rng.choice(SHAPES), thing.colour)))
        text = f"is there {article(f'{colour} {shape}')}?"
    elif form == "size":
        size = thing.size if true else {"small": "large", "large": "small"}[thing.size]
        text = f"is {reference(rng, scene, thing)} {rng.choice(SIZE_WORDS[size])}?"
    else:
        # a false claim about a held-out combination would teach that there is none
        others = [name for name in PLACES if name != thing.place and not replace(thing, place=name).held_out]
        where = thing.place if true else rng.choice(others)
        text = f"is {reference(rng, scene, thing)} {place(where, rng)}?"
    return text, "yes" if true else "no"


# ---- thoughts


def think_draw(scene: Scene) -> str:
    return f"<think>The picture should show {describe(scene)}.</think>"


def think_edit(edit: Edit) -> str:
    return f"<think>The picture shows {describe(edit.before)}. It should show {describe(edit.after)}.</think>"


def think_answer(question: Question) -> str:
    return f"<think>The picture shows {describe(question.scene)}.</think> {question.answer}"


def corpus(rng: Random, count: int) -> Iterable[str]:
    """Texts of all kinds, for training a tokenizer."""
    for questions, answer in CHAT.items():
        yield from (*questions, answer)
    for _ in range(count):
        edit = sample_edit(rng, False)
        question = sample_question(rng, edit.before)
        yield from (sample_prompt(rng, edit.after)[0], edit.text, think_edit(edit), think_draw(edit.after))
        yield from (question.text, question.answer, think_answer(question))
