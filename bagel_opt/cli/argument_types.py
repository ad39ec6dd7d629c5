"""What the command line takes as values, for argparse."""

import argparse
from pathlib import Path


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def word(text: str) -> str:
    """What is not empty, as a shell's variable is that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave the option out")
    return text


def path(text: str) -> Path:
    return Path(word(text))


def port(text: str) -> int:
    if not text.isdecimal() or int(text[:6]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; they go from 0 to 65535")
    return int(text)


def quantization(text: str) -> str | dict[str, str]:
    """Of `load`: a kind, or PART=KIND with commas."""
    word(text)
    pairs = [pair.partition("=")[::2] for pair in text.split(",")] if "=" in text else []
    if len(found := dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a part twice")
    return found or text


def parallel(text: str) -> str | dict[str, int]:
    """Of `load`: a way, or WAY=RANKS with commas."""
    word(text)
    pairs = [pair.partition("=")[::2] for pair in text.split(",")] if "=" in text else []
    if not all(ranks.isdecimal() for _, ranks in pairs) or len(found := dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no way of WAY=RANKS, as guidance=2,sequence=2")
    return {way: int(ranks) for way, ranks in found.items()} or text


def adapter(text: str) -> tuple[str, float]:
    place, _, factor = word(text).rpartition("=")
    if not place or Path(text).exists():
        return text, 1.0
    try:
        return place, float(factor)
    except ValueError:
        return text, 1.0


def kept_apart(text: str) -> tuple[str, tuple[str, float]]:
    name, sign, place = text.partition("=")
    if not (name and sign and place):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=FILE")
    return name, (place, 0.0)  # counts where a request asks for it


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """WIDTHxHEIGHT with commas."""
    found = [size.partition("x")[::2] for size in text.split(",")]
    if not all(side.isascii() and side.isdecimal() and int(side[:9]) > 0 for size in found for side in size):
        raise argparse.ArgumentTypeError(f"{text!r:.80} are no sizes as 1024x1024,768x1024")
    return tuple((int(width), int(height)) for width, height in found)
