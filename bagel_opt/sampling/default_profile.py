"""The profile where none is named, of an export or of a plan for a card: everything that the model can do, one request with its branches at a time."""

from bagel_opt.config import BagelConfig
from bagel_opt.images import resized
from bagel_opt.profile import Profile, load_profile, profile_names

TEXT = 64  # tokens of the shortest prompt that it must have room for
SPARE = 2  # how many times larger than needed an installed profile may be


def default_profile(config: BagelConfig) -> Profile:
    """The smallest profile in profiles/ for an edit of the model's largest square picture, up to 1024x1024, unless it has
    far more room than that takes; else one made for it, named "fitted"."""
    side = config.default_size
    latents = (side // config.token_pixels) ** 2
    width, height = resized((side, side), config.vit_resize)
    patches = (width // config.vit.patch_size) * (height // config.vit.patch_size)
    slots = 2 * (latents + 2) + patches + 2 + TEXT
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
