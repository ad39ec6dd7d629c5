"""Who may ask: API keys, and which pages in a browser."""

import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from bagel_opt.serve.errors import ApiError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
NAME = re.compile(r"[\w.-]+|\[[0-9a-f:.]+\]", re.ASCII | re.IGNORECASE)
HOST = re.compile(rf"({NAME.pattern})(:[0-9]+)?", re.ASCII | re.IGNORECASE)
ORIGIN = re.compile(rf"https?://{HOST.pattern}", re.ASCII)  # as browsers write it
KEY = re.compile(r"[!-~]+")  # what a header can carry


@dataclass(frozen=True)
class Access:
    """keys: with any, paths under /v1 need one of them as bearer token. hosts: names under which the server answers, for
    itself and for the pages that call it; None is any. origins: of pages elsewhere that a browser may let call it; "*" is
    all."""

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self):
        for key in self.keys:
            if not KEY.fullmatch(key):
                raise ValueError(f"an API key is {key!r}; allowed: at least one ASCII character, none of them a blank")
        for origin in self.origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--cors-origin {origin!r}: give https://NAME or http://NAME, with a port if any, or *"
                )

    def refuses(self, path: str, headers: Headers) -> ApiError | None:
        return self._host(headers) or (self._key(headers) if self.keys and path.startswith("/v1/") else None)

    def key(self, headers: Headers) -> str | None:
        """The key that a request has, if it is one."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.keys]  # as long for any key
        return self.keys[known.index(True)] if scheme.lower() == "bearer" and any(known) else None

    def _key(self, headers: Headers) -> ApiError | None:
        if self.key(headers):
            return None
        return ApiError(401, "give a valid API key as bearer token", code="invalid_api_key")

    def _host(self, headers: Headers) -> ApiError | None:
        """Refuses what a page elsewhere makes a browser send: its own name for this address, or its origin."""
        if self.hosts is None:
            return None
        given = headers.getlist("host")
        host = given[0].lower() if len(given) == 1 else ""
        found = HOST.fullmatch(host)
        if not found or found[1] not in self.hosts:
            name = (found and found[1]) or "this name"
            return ApiError(
                403, f"this server does not answer as {name}; see its option --allowed-host", code="bad_host"
            )
        for origin in headers.getlist("origin"):
            if not {origin.lower(), "*"}.intersection(self.origins) and not self._own(origin.lower(), host):
                message = "this server does not answer pages of other origins; see its option --cors-origin"
                return ApiError(403, message, code="bad_origin")
        return None

    def _own(self, origin: str, host: str) -> bool:
        """Whether a page was loaded from here. A name that was allowed may stand for any port: a proxy has its own."""
        try:
            place = urlsplit(origin).netloc
        except ValueError:
            return False
        found = HOST.fullmatch(place)
        return bool(place) and (place == host or bool(found and found[1] in self.hosts - LOOPBACK))


def split_keys(given: Iterable[str], variable: str | None) -> tuple[str, ...]:
    """The keys of the command line, and those of BAGEL_OPT_API_KEYS with commas between them. variable: None where it is
    not set. Raises ValueError for an empty one: a shell variable that was not set would open the server."""
    keys = [key.strip() for key in (*given, *(() if variable is None else variable.split(",")))]
    if "" in keys:
        raise ValueError("an API key is empty; set --api-key and BAGEL_OPT_API_KEYS to keys, or leave them out")
    return tuple(keys)


def allowed_hosts(listening: str, others: Sequence[str] = ()) -> frozenset[str] | None:
    """Where a server listens on loopback, or names are given: the names under which it answers."""
    for name in others:
        if not NAME.fullmatch(name):
            raise ValueError(f"--allowed-host {name!r}: give a name or an address, without a port")
    own = listening.lower()
    try:
        local = own == "localhost" or ipaddress.ip_address(own).is_loopback
    except ValueError:
        local = False
    if not local and not others:
        return None
    return LOOPBACK | {f"[{own}]" if ":" in own else own, *(name.lower() for name in others)}
