"""The profile where none is named, of an export or of a plan for a card: everything that the model can do, one request with its branches at a time."""

from math import prod

from bagel_opt.lance.config import Config
from bagel_opt.lance.pictures import planned_input
from bagel_opt.profile import Profile, load_profile, profile_names
from bagel_opt.sampling.lance import RESOLUTIONS
from bagel_opt.sampling.pictures import planned_image

TEXT = 64  # tokens of the shortest prompt that it must have room for
SPARE = 2  # how many times larger than needed an installed profile may be


# How a picture of (width, height) would be read, by families.
PLANNED = {
    "bagel": lambda size, config: planned_image(size, config, "the largest picture"),
    "lance": lambda size, config: planned_input(size, 1, config, RESOLUTIONS["image"], "the largest picture"),
}


def default_profile(config: Config) -> Profile:
    """The smallest profile in profiles/ for an edit of the model's largest square picture, up to 1024x1024, unless it has
    far more room than that takes; else one made for it, named "fitted"."""
    side = config.default_size
    latents = (side // config.token_pixels) ** 2
    patches = prod(PLANNED[config.family]((side, side), config).vit_grid)
    slots = 2 * (latents + 2) + patches // (config.vit_joins or 1) + 2 + TEXT
    fitting = [
        profile
        for profile in map(load_profile, profile_names())
        if profile.rows == 3
        and latents <= profile.latents <= SPARE * latents
        and patches <= profile.patches <= SPARE * patches
        and slots <= profile.slots
    ]
    if fitting:
        return min(fitting, key=Profile.cost)
    room = -(-(slots + latents) // 256) * 256  # for a longer text, or a thought
    return Profile("fitted", rows=3, slots=room, text=TEXT, patches=patches, latents=latents)
