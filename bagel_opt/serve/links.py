"""Pictures that an answer has an address of, for clients that read no base64."""

import secrets
import time
from collections import OrderedDict

SECONDS = 3600.0  # for which an address holds
BYTES = 2**28  # of all; the oldest give way


class Links:
    """In memory, of the event loop. A name is a secret: whoever has it has the picture, so it needs no key."""

    def __init__(self, seconds: float = SECONDS, most: int = BYTES):
        self.seconds, self.left = seconds, most
        self.held: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def keep(self, data: bytes, file_format: str) -> str:
        """-> its name"""
        self.left -= len(data)
        name = f"{secrets.token_urlsafe(24)}.{file_format}"
        self.held[name] = time.monotonic() + self.seconds, data
        self._drop_old()
        return name

    def get(self, name: str) -> bytes | None:
        self._drop_old()
        return self.held.get(name, (0, None))[1]

    def _drop_old(self) -> None:
        while self.held and (self.left < 0 or next(iter(self.held.values()))[0] < time.monotonic()):
            _, (_, data) = self.held.popitem(last=False)
            self.left += len(data)
