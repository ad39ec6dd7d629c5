"""Exceptions of bagel_opt. All are ValueErrors with one line saying what is wrong, where, and what to do."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: tensors missing, surplus or mis-shaped, a truncated or inconsistent file."""


class BundleError(ValueError):
    """A bundle that cannot be loaded: a changed or missing file, a format that this version does not know."""


class ProfileError(ValueError):
    """A profile that is malformed, or a request that does not fit the profile."""


class UnknownOptionError(TypeError, ValueError):
    """An option that no request has: a TypeError like any unexpected keyword, a ValueError like any bad option."""
