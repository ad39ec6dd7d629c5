"""The options as the page shows them: options.json."""

from collections.abc import Collection
from typing import Any

from bagel_opt.option_kinds import Choice, Flag, Interval, Number, Text, Texts
from bagel_opt.options import EVERY, INPUTS, INTERLEAVING, PICTURE, READING, VIDEO, Option, Options, described
from bagel_opt.serve.fields import TEXT_LIMIT, WHOLE_LIMIT
from bagel_opt.serve.limits import Limits

MODES = {
    PICTURE: ["draw", "edit", "video", "interleave"],
    INPUTS: ["edit", "interleave"],
    VIDEO: ["video"],
    READING: ["edit", "ask", "interleave"],
    INTERLEAVING: ["interleave"],
    EVERY: ["draw", "edit", "video", "ask", "interleave"],
}
OWN = ("seed", "think")  # beside the prompt, as the size is, whose choices depend on the model


def page_options(limits: Limits, defaults: Options, without: Collection[str]) -> list[dict[str, Any]]:
    """Of each option its name, help and modes; type, and what of that type is allowed; default, what counts where none is
    sent; value, what the page begins with, which a server's limit may keep below the default. defaults: the model's; without: the options
    that it has not."""
    found = (
        described(INTERLEAVING) | described(VIDEO) | described(PICTURE, INPUTS) | described(EVERY) | described(READING)
    )
    shown = [option for name, option in found.items() if name not in OWN and name not in without]
    return [_entry(option, limits, getattr(defaults, option.name)) for option in shown]


def _entry(option: Option, limits: Limits, default: Any) -> dict[str, Any]:
    about = {"name": option.name, "help": option.sentence, "modes": MODES[option.group]}
    about |= {"default": default, "value": default, "unset": option.unset}
    match option.kind:
        case Number(low, high, whole):
            own = {"num_timesteps": limits.timesteps, "max_rounds": min(high or WHOLE_LIMIT, limits.pictures)}
            most = own.get(option.name, WHOLE_LIMIT if high is None else high)
            value = None if default is None else min(default, most)
            return about | {"type": "number", "min": low, "max": most, "step": 1 if whole else "any", "value": value}
        case Interval(low, high):
            return about | {"type": "interval", "min": low, "max": high, "step": "any"}
        case Choice(values):
            return about | {"type": "choice", "choices": values}
        case Flag():
            return about | {"type": "flag"}
        case Text():
            return about | {"type": "text", "max": TEXT_LIMIT}
        case Texts(longest=longest):  # the page has room for one
            one = default[0] if default else None
            return about | {"type": "text", "max": longest, "default": one, "value": one}
    raise TypeError(f"the page cannot show {option.name}")
