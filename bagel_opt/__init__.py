"""bagel_opt: BAGEL and Lance on static shapes, eagerly, compiled and from bundles. Start with `load`."""

from bagel_opt.api import Model
from bagel_opt.errors import BundleError, CheckpointError, ProfileError, UnknownOptionError
from bagel_opt.loading import load
from bagel_opt.options import Options, StepEvent
from bagel_opt.profile import Profile
from bagel_opt.request import Request
from bagel_opt.videos import save_video

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "CheckpointError",
    "Model",
    "Options",
    "Profile",
    "ProfileError",
    "Request",
    "StepEvent",
    "UnknownOptionError",
    "load",
    "save_video",
]
