"""Pictures from addresses that clients name: public ones alone, checked after resolution and on every redirect."""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

REDIRECTS = 3
SECONDS = 10.0  # for everything together
REDIRECT = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # carries any IPv4 address


def fetch(url: str, most: int) -> bytes:
    """What an http(s) URL of a public address holds, up to `most` bytes. Raises ValueError saying what is wrong."""
    end = time.monotonic() + SECONDS
    try:
        for _ in range(REDIRECTS + 1):
            answer = _request(url, end)
            if answer.status not in REDIRECT:
                break
            url = urljoin(url, answer.headers.get("Location", ""))
        if answer.status != 200:
            raise ValueError(f"it answers with status {answer.status}")
        data = b""
        while chunk := answer.read1(2**16):
            data += chunk
            if len(data) > most:
                raise ValueError(f"it is larger than {most} bytes")
            if time.monotonic() > end:
                raise TimeoutError
        return data
    except TimeoutError:
        raise ValueError(f"it did not come within {SECONDS:g} seconds") from None
    except (OSError, http.client.HTTPException, UnicodeError):
        raise ValueError("it cannot be fetched") from None


def _request(url: str, end: float) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("it is no http(s) address")
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    address, port = _resolve(parts)
    sock = socket.create_connection((address, port), timeout=left)  # the address that was checked, not the name
    if parts.scheme == "https":
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = sock
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET", target, headers={"Host": parts.netloc, "Accept": "image/*", "Connection": "close"})
    return connection.getresponse()


def _resolve(parts: SplitResult) -> tuple[str, int]:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = [info[4][0] for info in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(address):
            raise ValueError("its address is not public")
    return found[0], port


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where it carries an IPv4 address within."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
