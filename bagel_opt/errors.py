"""Exceptions of bagel_opt. All are ValueErrors with one line saying what is wrong, where, and what to do."""

import re

# Control characters but tab and newline, marks that turn the direction of writing, halves of surrogate pairs.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

HOST_FULL = "DefaultCPUAllocator", "std::bad_alloc"  # as torch says, in a RuntimeError, that the host's memory is full


def shown(text: str) -> str:
    """Text of a file, a model or a library, with what would steer a terminal written out, such as \\x1b."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def reason(error: BaseException) -> str:
    """What a library's exception says first, or its kind where it says nothing."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


class _OneLine(ValueError):
    """Names out of files may hold anything; the message has them on one line."""

    def __init__(self, message: str):
        super().__init__(shown(message).replace("\n", "\\n"))


class CheckpointError(_OneLine):
    """A checkpoint that cannot be read: tensors missing, surplus or mis-shaped, a truncated or inconsistent file."""


class BundleError(_OneLine):
    """A bundle that cannot be loaded: a changed or missing file, a format that this version does not know."""


class ProfileError(_OneLine):
    """A profile that is malformed, or a request that does not fit the profile."""


class UnknownOptionError(TypeError, ValueError):
    """An option that no request has: a TypeError like any unexpected keyword, a ValueError like any bad option."""
