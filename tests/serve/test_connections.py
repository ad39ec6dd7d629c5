"""Clients that stall, at any place: their connections end, others are served, and the server can be stopped."""

import contextlib
import http.client
import json
import logging
import socket
import time

import pytest
from serving import FEW, serving, until
from support import CHECKPOINT

import bagel_opt
from bagel_opt.examples import Examples
from bagel_opt.serve import connections, middleware, patience
from bagel_opt.serve.connections import Connection
from bagel_opt.serve.logs import AT_MOST, WINDOW, Bounded

STALL = 0.5


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


@pytest.fixture
def quick(monkeypatch):
    """Little patience, so that tests are short."""
    for module in (patience, connections, middleware):
        monkeypatch.setattr(module, "STALL", STALL)
    monkeypatch.setattr(connections, "LINGER", STALL)


@pytest.fixture
def server(model, quick):
    with serving(model, max_queue=8) as running:
        yield running


def connect(server, data=b"", **options):
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.connect(("127.0.0.1", server.port))
    connection.settimeout(10)
    connection.sendall(data)
    return connection


def ended(connection):
    """What came until the server closed the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            data += piece
    return data


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\r\n",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: a\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET",
    ],
)
def test_heads_that_never_end(server, sent):
    connection, began = connect(server, sent), time.monotonic()
    answer = ended(connection)
    assert STALL * 0.9 < time.monotonic() - began < 8
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def send_on(connection, piece, pause, seconds=8.0):
    """-> the seconds after which the server had closed the connection"""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < seconds:
            connection.sendall(piece)
            time.sleep(pause)
    return time.monotonic() - began


def test_heads_that_trickle(server):
    assert send_on(connect(server, b"GET /health HTTP/1.1\r\n"), b"A: b\r\n", 0.05) < 8


def test_heads_too_large(server, monkeypatch):
    monkeypatch.setattr(connections, "STALL", 30)
    assert send_on(connect(server, b"GET /health HTTP/1.1\r\n"), b"A: " + b"b" * 2**14 + b"\r\n", 0.01) < 8


@pytest.mark.parametrize(
    "length", [b"Content-Length: 100\r\n", b"Content-Length: 1000000\r\n", b"Transfer-Encoding: chunked\r\n"]
)
def test_bodies_that_never_end(server, length):
    """Each is told so, and its connection ends, also if more comes all the time but too slowly."""
    part = b'5\r\n{"pro\r\n' if b"chunked" in length else b'{"pro'
    silent, trickling = connect(server, HEAD + length + b"\r\n" + part), connect(server, HEAD + length + b"\r\n" + part)
    answer = ended(silent)
    assert send_on(trickling, b"1\r\na\r\n" if b"chunked" in length else b"a", 0.05) < 8
    assert b"HTTP/1.1 408" in answer
    assert server.service.bodies.left == server.service.limits.bodies_bytes
    until(lambda: server.rows_in_use() == 0)


def test_the_rest_of_a_body_that_nobody_wants(server):
    """Its sender can read the answer, and go on if all of it comes soon; then the connection ends."""
    head = b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    for last in (b"Connection: close\r\n\r\n", b"\r\n"):
        large = connect(server, head[:-2].replace(b"100000", b"9000000") + last)
        large.sendall(bytes(9_000_000))  # more than the buffers between hold
        time.sleep(0.1)
        assert large.recv(2**16).startswith(b"HTTP/1.1 404")
    connection = connect(server, head + bytes(50000))
    assert connection.recv(2**16).startswith(b"HTTP/1.1 404")
    connection.sendall(bytes(50000) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
    connection, began = connect(server, head + bytes(10)), time.monotonic()
    assert ended(connection).startswith(b"HTTP/1.1 404")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("keep_alive", [True, False])
def test_answers_that_are_not_read(server, monkeypatch, keep_alive):
    """A picture of 12 MB, and a reader that takes none of it: the connection ends."""
    monkeypatch.setattr(patience, "RATE", 2**30)
    large = Examples(picture=bytes(12 * 2**20))
    monkeypatch.setattr(bagel_opt.Model, "examples", property(lambda _: large))
    ask = b"GET /example.png HTTP/1.1\r\nHost: a\r\n" + (b"" if keep_alive else b"Connection: close\r\n") + b"\r\n"
    connection = connect(server, ask, SO_RCVBUF=4096)
    until(lambda: server.connections)
    until(lambda: not server.connections, 8)
    connection.close()


def test_too_many_connections(server, monkeypatch):
    """Those that sent nothing make room, the oldest first; those that are served stay."""
    monkeypatch.setattr(connections, "STALL", 30)
    monkeypatch.setattr(Connection, "most", 8)
    server.runtime.open.clear()
    body = json.dumps({"prompt": "a", "seed": 1, **FEW}).encode()
    busy = [connect(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) for _ in range(3)]
    until(lambda: len(server.engine.tickets) == 3)
    silent = [connect(server) for _ in range(20)]
    web = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(3):
        web.request("GET", "/health")
        assert web.getresponse().read() == b'{"status":"ok"}'
    for connection in silent[:15]:
        assert ended(connection) == b""
    server.runtime.open.set()
    for connection in busy:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 200


def test_many_requests_at_once_on_one_connection(server):
    """Eight may wait; a thousand, which would take memory for each, are refused."""
    get = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    assert ended(connect(server, get * 8)).count(b"HTTP/1.1 200") == 8
    assert ended(connect(server, get * 1000)).count(b"HTTP/1.1 200") < 100


def test_a_stop_does_not_wait_for_those_who_stall(model):
    """Half a head, half a body, an answer that nobody reads: none was accepted, or all was done for it."""
    with serving(model) as server:
        stalling = [
            connect(server, b"GET / HT"),
            connect(server, HEAD + b"Content-Length: 100\r\n\r\n{"),
            connect(server, HEAD + b"Content-Length: 3000000\r\n\r\n{"),
        ]
        until(lambda: server.service.bodies.left < server.service.limits.bodies_bytes)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert all(connection.fileno() > 0 for connection in stalling)


def test_uploads_that_break_off_are_no_fault_of_the_server(server, caplog):
    for path, kind in (
        ("/v1/images/edits", "multipart/form-data; boundary=b"),
        ("/v1/chat/completions", "application/json"),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
        connection = connect(server, head.encode() + b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx')
        with caplog.at_level(logging.INFO):
            time.sleep(0.1)
            connection.close()
            until(lambda: any(getattr(r, "fields", {}).get("path") == path for r in caplog.records))  # noqa: B023
    statuses = [record.fields["status"] for record in caplog.records if hasattr(record, "fields")]
    assert statuses == [499, 499]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_head_requests(server):
    for path in ("/health", "/ready", "/"):
        web = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        web.request("HEAD", path)
        answer = web.getresponse()
        assert (answer.status, answer.read()) == (200, b"")


def test_the_log_is_bounded():
    """What one place in the code says again and again is counted instead, and the count told."""
    log, bounded = logging.getLogger("test.bounded"), Bounded()

    def record(level, created, line=1):
        made = log.makeRecord(log.name, level, "file.py", line, "out of %s", ("files",), None)
        made.created = created
        return made

    assert sum(bounded.filter(record(logging.ERROR, i / 1000)) for i in range(10_000)) == AT_MOST
    assert bounded.filter(record(logging.ERROR, 1.0, line=2))
    assert all(bounded.filter(record(logging.INFO, 1.0)) for _ in range(100))
    later = record(logging.ERROR, WINDOW + 1)
    assert bounded.filter(later)
    assert later.fields == {"left_out": 10_000 - AT_MOST}
