"""Texts at which an answer ends."""

from collections.abc import Callable


def ends(said: Callable[[list[int]], str], ids: list[int], stops: tuple[str, ...]) -> bool:
    """Whether the last of the ids completes one of the texts. said: the text of ids, of which the first only begins it."""
    if not stops:
        return False
    last = (
        max(len(stop.encode()) for stop in stops) + 4
    )  # a token has a byte at least, but for those of a broken character
    text = said([ids[0], *ids[1:][-last:]])
    return any(stop in text for stop in stops)


def before_stops(text: str, stops: tuple[str, ...]) -> str:
    """What comes before the first of the texts."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
