"""Pictures from addresses that clients name: public ones alone, checked as each connection is made, redirects too."""

import asyncio
import ipaddress
import socket
from typing import Any

import aiohttp

REDIRECTS = 3
SECONDS = 10.0  # for everything together: the name, redirects, and all of the picture
# Special-purpose addresses: the registries of IANA (iana-ipv4-special-registry, iana-ipv6-special-registry; RFC 6890), as
# read on 2026-11-28, and what was given up: 6to4's relays (RFC 7526) and the 6bone (RFC 3701). Also those that are
# reachable (AS112, AMT): nobody has pictures there.
NO_IPV4 = """
0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.31.196.0/24
192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4
240.0.0.0/4
"""
IPV6 = "2000::/3"  # global unicast, RFC 4291; of it not
NO_IPV6 = "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3ffe::/16 3fff::/20"

_NO_IPV4 = [ipaddress.ip_network(block) for block in NO_IPV4.split()]
_IPV6, _NO_IPV6 = ipaddress.ip_network(IPV6), [ipaddress.ip_network(block) for block in NO_IPV6.split()]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet. Python's own tables differ by its version."""
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        return not any(ip in block for block in _NO_IPV4)
    return ip in _IPV6 and not any(ip in block for block in _NO_IPV6)


class NotPublicError(OSError):
    """An address that is not public."""


def _socket(info: tuple) -> socket.socket:
    """For a connection that is about to be made: what the name says does not count, nor what it said before."""
    family, kind, protocol, _, (address, *_) = info
    if not is_public(address):
        raise NotPublicError
    return socket.socket(family, kind, protocol)


async def fetch(url: str, most: int) -> bytes:
    """What an http(s) URL of a public address holds, up to `most` bytes. Raises ValueError saying what is wrong."""
    try:
        async with asyncio.timeout(SECONDS):
            return await _fetch(url, most)
    except TimeoutError:
        raise ValueError(f"it did not come within {SECONDS:g} seconds") from None
    except aiohttp.TooManyRedirects:
        raise ValueError(f"it redirects more than {REDIRECTS} times") from None
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise ValueError("it is no http(s) address") from None
    except (aiohttp.ClientError, OSError, UnicodeError) as error:
        raise ValueError("its address is not public" if _refused(error) else "it cannot be fetched") from None


async def _fetch(url: str, most: int) -> bytes:
    connector = aiohttp.TCPConnector(socket_factory=_socket, force_close=True)
    settings: dict[str, Any] = {"auto_decompress": False, "cookie_jar": aiohttp.DummyCookieJar(), "trust_env": False}
    async with (
        aiohttp.ClientSession(connector=connector, headers={"Accept": "image/*"}, **settings) as session,
        session.get(url, max_redirects=REDIRECTS) as answer,
    ):
        if answer.status != 200:
            raise ValueError(f"it answers with status {answer.status}")
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > most:
                raise ValueError(f"it is larger than {most} bytes")
        return bytes(data)


def _refused(error: BaseException | None) -> bool:
    """Whether the check of an address is what an error came of."""
    while error is not None and not isinstance(error, NotPublicError):
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__
    return error is not None
