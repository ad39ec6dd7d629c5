"""What a server runs before it says that it is ready, so that no request waits for a compiler."""

import logging
import time
from collections.abc import Sequence

from bagel_opt.api import Model
from bagel_opt.errors import ProfileError
from bagel_opt.request import Request

STEPS = 8  # points of time: steps with and without guidance, each more than once, since graphs are captured then
log = logging.getLogger("bagel_opt.serve")


def warm_up(model: Model, sizes: Sequence[tuple[int, int]]) -> None:
    """Draws a picture of each size (width, height), edits it and asks about it. Raises ValueError for a size that the model or
    its profiles have no room for."""
    for width, height in sizes:
        began = time.perf_counter()
        try:
            picture = model.generate("a", width=width, height=height, num_timesteps=STEPS, seed=0)
        except ValueError as error:
            raise ValueError(f"warm {width}x{height}: {error}") from None
        for request in (
            Request([picture, "a"], num_timesteps=STEPS, seed=0),
            Request([picture, "a"], output="text", max_think_tokens=8),
        ):
            try:
                model.run_many([request])
            except ProfileError as error:  # the profile is not for such requests, and they will be refused
                log.info("not warmed with pictures of %dx%d as input: %s", width, height, error)
        log.info("warm for %dx%d, in %.1f s", width, height, time.perf_counter() - began)
