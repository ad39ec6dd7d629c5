"""What a bundle fixed when it was exported."""

import pytest

import bagel_opt
from bagel_opt import BundleError, ProfileError


def test_settings_that_a_bundle_fixes_are_refused(bundle):
    for settings in ({"dtype": "float16"}, {"profile": "tiny"}, {"attention": "flex"}, {"quantization": "fp8"}):
        with pytest.raises(BundleError, match="fixed when it was exported"):
            bagel_opt.load(bundle, **settings)
    with pytest.raises(ValueError, match="backend='compile'"):
        bagel_opt.load(bundle, backend="compile")
    with pytest.raises(ValueError, match="device='cuda'"):
        bagel_opt.load(bundle, device="cuda")


def test_a_request_beyond_the_profile_is_refused(bundle):
    model = bagel_opt.load(bundle)
    with pytest.raises(ProfileError, match=r"needs slots of at least \d+, but profile 'tiny' has slots = 768"):
        model.chat("a b " * 400)
