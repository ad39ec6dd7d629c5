"""The options as the page shows them: options.json."""

from typing import Any

from bagel_opt.options import EVERY, INPUTS, PICTURE, Choice, Flag, Interval, Number, Option, Text, described
from bagel_opt.serve.limits import Limits
from bagel_opt.serve.schemas import TEXT_LIMIT, WHOLE_LIMIT

MODES = {PICTURE: ["draw", "edit"], INPUTS: ["edit"], EVERY: ["draw", "edit", "ask"]}
OWN = ("seed", "think")  # beside the prompt, as the size is, whose choices depend on the model


def page_options(limits: Limits) -> list[dict[str, Any]]:
    """Of each option its name, help and modes; type, and what of that type is allowed; default, what counts where none is
    sent; value, what the page begins with, which a server's limit may keep below the default."""
    found = [option for option in (described(PICTURE, INPUTS) | described(EVERY)).values() if option.name not in OWN]
    return [_entry(option, limits) for option in found]


def _entry(option: Option, limits: Limits) -> dict[str, Any]:
    about = {"name": option.name, "help": option.sentence, "modes": MODES[option.group]}
    about |= {"default": option.default, "value": option.default, "unset": option.unset}
    match option.kind:
        case Number(low, high, whole):
            most = limits.timesteps if option.name == "num_timesteps" else WHOLE_LIMIT if high is None else high
            value = None if option.default is None else min(option.default, most)
            return about | {"type": "number", "min": low, "max": most, "step": 1 if whole else "any", "value": value}
        case Interval(low, high):
            return about | {"type": "interval", "min": low, "max": high, "step": "any"}
        case Choice(values):
            return about | {"type": "choice", "choices": values}
        case Flag():
            return about | {"type": "flag"}
        case Text():
            return about | {"type": "text", "max": TEXT_LIMIT}
    raise TypeError(f"the page cannot show {option.name}")
