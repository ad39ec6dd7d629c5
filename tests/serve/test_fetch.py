"""Pictures from addresses: which are public, one deadline for all, and slow sites that hold up nobody."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from serving import FEW, data_url, png, serving
from support import CHECKPOINT

from bagel_opt.serve import fetch as fetching


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


PUBLIC = ["8.8.8.8", "1.1.1.1", "100.128.0.1", "172.32.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.255"]
PUBLIC += ["2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "2003::1", "2001:200::1"]
OTHERS = ["0.0.0.0", "10.1.2.3", "100.64.0.1", "100.127.255.255", "127.0.0.1", "169.254.169.254", "172.16.0.1"]
OTHERS += ["172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1"]
OTHERS += ["192.168.1.1", "192.175.48.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1"]
OTHERS += [
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:8.8.8.8",
    "::8.8.8.8",
    "64:ff9b::808:808",
]
OTHERS += ["64:ff9b:1::1", "100::1", "2001::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:30::1", "2001:1ff::1"]
OTHERS += [
    "2001:db8::1",
    "2002:808:808::1",
    "2620:4f:8000::1",
    "3ffe::1",
    "3fff::1",
    "3fff:fff::1",
    "4000::1",
    "5f00::1",
]
OTHERS += ["fc00::1", "fd00::1", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1"]


@pytest.mark.parametrize(("address", "public"), [(a, True) for a in PUBLIC] + [(a, False) for a in OTHERS])
def test_public_addresses(address, public):
    assert fetching.is_public(address) is public


@pytest.fixture
def site():
    """A web server here: a picture, redirects, too much, an error, and one that never comes to an end."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, location, body = 200, None, png(32)
            if self.path == "/inside":
                status, location = 302, "http://10.0.0.1/a.png"
            elif self.path == "/loop":
                status, location = 302, "/loop"
            elif self.path == "/once":
                status, location = 307, "/a.png"
            elif self.path == "/file":
                status, location = 302, "file:///a.png"
            elif self.path == "/large":
                body = bytes(2**19)
            elif self.path == "/missing":
                status = 404
            try:
                while self.path == "/slow-head" and not over.wait(0.05):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n" if self.close_connection else b"A: b\r\n")
                    self.wfile.flush()
                    self.close_connection = False
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for at in range(len(body)) if self.path == "/slow" else ():
                    self.wfile.write(body[at : at + 1])
                    if over.wait(0.2):
                        return
                self.wfile.write(body)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    over.set()
    web.shutdown()
    thread.join()
    web.server_close()


def fetch(url):
    return asyncio.run(fetching.fetch(url, 2**18))


@pytest.fixture
def here(monkeypatch):
    """This machine counts as public."""
    real = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or real(address))


def test_fetching_inside(site):
    with pytest.raises(ValueError, match="not public"):
        fetch(f"{site}/a.png")
    with pytest.raises(ValueError, match="not public"):  # what the name resolves to counts
        fetch(f"{site.replace('127.0.0.1', 'localhost')}/a.png")


def test_fetching(site, here):
    assert fetch(f"{site}/a.png") == fetch(f"{site}/once") == png(32)
    for path, reason in (
        ("inside", "not public"),
        ("loop", "redirects more than 3"),
        ("file", "no http"),
        ("large", "larger"),
        ("missing", "404"),
    ):
        with pytest.raises(ValueError, match=reason):
            fetch(f"{site}/{path}")
    for url in (
        "file:///etc/passwd",
        "ftp://a/b",
        "http://",
        "http://\udcff/",
        "nothing",
        "http://a:99999/",
        "http://[/",
    ):
        with pytest.raises(ValueError, match=r"it (is no|cannot)"):
            fetch(url)


@pytest.mark.parametrize("path", ["slow", "slow-head"])
def test_one_deadline_for_all_of_a_fetch(site, here, monkeypatch, path):
    monkeypatch.setattr(fetching, "SECONDS", 0.6)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"within 0\.6 seconds"):
        fetch(f"{site}/{path}")
    assert time.monotonic() - began < 3


def messages(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_remote_pictures_where_they_are_allowed(model, site, monkeypatch):
    with serving(model, remote=True) as server:
        create = server.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match="not public"):
            create(model="test", messages=messages(f"{site}/a.png"), max_tokens=3)
        monkeypatch.setattr(fetching, "is_public", lambda address: True)
        answers = [
            create(model="test", messages=messages(url), max_tokens=3) for url in (f"{site}/a.png", data_url(png(32)))
        ]
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_slow_sites_hold_up_nobody(model, site, here, monkeypatch):
    """Twelve of them, and pictures are drawn, and the server ends when it is told to."""
    monkeypatch.setattr(fetching, "SECONDS", 2.0)
    with ThreadPoolExecutor(12) as pool, serving(model, remote=True, max_queue=32) as server:
        client = server.client()
        slow = [
            pool.submit(client.chat.completions.create, model="test", messages=messages(f"{site}/slow"), max_tokens=3)
            for _ in range(12)
        ]
        while server.engine.planned < 12:
            time.sleep(0.01)
        began = time.monotonic()
        assert client.images.edit(image=png(32), prompt="a", extra_body=FEW).data
        assert client.images.generate(prompt="a", extra_body=FEW).data
        assert time.monotonic() - began < 1.9
        assert not any(answer.done() for answer in slow)
        for answer in slow:
            assert "did not come within" in str(answer.exception())
