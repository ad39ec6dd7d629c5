"""How long a client may take. One rule for what it sends and for what it is sent."""

STALL = 20.0  # seconds in which something must come, or go
RATE = 2**14  # bytes a second that it must reach from then on


def patience(size: int) -> float:
    """Seconds in which so many bytes must have come or gone."""
    return STALL + size / RATE
