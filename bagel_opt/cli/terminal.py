"""Showing a picture in the terminal, and naming the command that makes it again."""

import argparse
import os
import shlex
import sys

from PIL import Image
from rich.console import Console

ROWS = 24  # of text, that a picture takes at most


def show(picture: Image.Image) -> None:
    """Shows a picture on stdout where that is a terminal with graphics: kitty's protocol, or Sixel, which iTerm2 has too."""
    if not _may_ask():
        return
    # the import asks the terminal what it can show, and waits up to 0.1 s for each of two answers
    from textual_image.renderable import Image as Best
    from textual_image.renderable import SixelImage, TGPImage

    if Best in (SixelImage, TGPImage):
        rows = Console().height - 4  # the rest for what is said below the picture
        Console(height=max(1, min(ROWS, rows))).print(Best(picture, "auto", "auto"))


def again(a: argparse.Namespace) -> str:
    """The command that `main` was given, with the seed that was drawn where it had none."""
    command, *rest = a.argv
    seed = ["--seed", str(a.seed)] if a.seed_drawn else []  # before the rest, which may hold a "--"
    return shlex.join(["bagel-opt", command, *seed, *rest])


def _may_ask() -> bool:
    """Whether stdin and stdout are a terminal that would answer, and not to another process: one in the background would
    be stopped for reading."""
    if not (sys.stdin and sys.stdout and sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    if os.environ.get("TERM") == "dumb":
        return False
    return not hasattr(os, "tcgetpgrp") or os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
