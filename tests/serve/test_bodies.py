"""Bodies made to be dear: each is answered soon after its last byte, and others are answered meanwhile."""

import base64
import http.client
import json
import threading
import time

import openai
import pytest
from serving import FEW, ask, data_url, png, serving
from support import CHECKPOINT

from bagel_opt.serve import Limits
from bagel_opt.serve.bodies import cut_pictures, parse
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.limits import BODY_ITEMS, BODY_TEXT, BODY_VALUES

LARGE = 8 * 2**20  # of the 32 MiB that are allowed, so that the test is short
CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture(scope="module")
def server(load):
    with serving(load(CHECKPOINT, "onnx"), limits=Limits(body_bytes=2 * LARGE)) as running:
        yield running


def filled(head, item, tail, size=LARGE):
    return head + item * ((size - len(head) - len(tail)) // len(item)) + tail


PART = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}},'
MESSAGE = b'{"role":"user","content":"a"},'
BODIES = {
    "wrong parts": (CHAT, filled(b'{"messages":[{"role":"user","content":[', b"{},", b"{}]}]}")),
    "wrong messages": (CHAT, filled(b'{"messages":[', b"1,", b"1]}")),
    "many messages": (CHAT, filled(b'{"messages":[', MESSAGE, MESSAGE[:-1] + b"]}")),
    "many pictures": (CHAT, filled(b'{"messages":[{"role":"user","content":[', PART, PART[:-1] + b"]}]}")),
    "unknown keys": (DRAW, b"{" + b",".join(b'"%07d":1' % i for i in range(LARGE // 12)) + b"}"),
    "the same key": (DRAW, filled(b"{", b'"prompt":"a",', b'"prompt":"a"}')),
    "metadata": (CHAT, filled(b'{"metadata":{"a":[', b"0,", b"0]}}")),
    "deep": (DRAW, b"[" * LARGE),
    "objects in objects": (DRAW, b'{"a":' * (LARGE // 5)),
    "a long text": (DRAW, filled(b'{"prompt":"', b"a", b'"}')),
    "escapes": (DRAW, filled(b'{"prompt":"', b"\\u00e9", b'"}')),
    "half surrogates": (DRAW, filled(b'{"prompt":"', b"\\ud800", b'"}')),
    "a long number": (DRAW, filled(b'{"n":', b"1", b"}")),
    "a long fraction": (DRAW, filled(b'{"cfg_text_scale":1.', b"1", b"}")),
    "blanks": (DRAW, filled(b'{"prompt":', b" ", b'"a"}')),
    "quotation marks": (DRAW, filled(b"[", b'"', b"]")),
    "beginnings of data URLs": (CHAT, filled(b"[", b'"data:', b"]")),
    "data URLs": (CHAT, filled(b"[", b'"data:;base64,"', b"]")),
    "escaped data URLs": (CHAT, filled(b'["', b'\\"data:;base64,\\"', b'"]')),
    "base64 in which all is escaped": (
        CHAT,
        filled(b'{"messages":[{"role":"user","content":[' + PART[:-6], b"\\/", b'"}}]}]}'),
    ),
    "base64 that is none": (CHAT, filled(b'{"messages":[{"role":"user","content":[' + PART[:-6], b"*", b'"}}]}]}')),
    "no JSON": (CHAT, b"\xff" * LARGE),
}


class Heartbeat:
    """Asks for /health all the time, and knows the longest that it took."""

    def __init__(self, server):
        self.server, self.over, self.longest = server, threading.Event(), 0.0
        self.thread = threading.Thread(target=self._beat)

    def _beat(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        while not self.over.is_set():
            began = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.longest = max(self.longest, time.perf_counter() - began)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def post(server, path, body):
    """-> (status, answer, seconds from the last byte to the answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    connection.send(body)
    began = time.perf_counter()
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), time.perf_counter() - began


@pytest.mark.parametrize("name", BODIES)
def test_dear_bodies(server, name):
    """Bounds ten times those that hold on an idle machine; before, some of these took minutes."""
    path, body = BODIES[name]
    with Heartbeat(server) as heart:
        status, answer, seconds = post(server, path, body)
    assert status in (400, 413), answer
    assert len(answer["error"]["message"]) < 300
    assert seconds < 5
    assert heart.longest < 1


def test_many_lists_of_errors_are_bounded():
    """What is checked by pydantic is small, whatever was sent."""
    for text in (
        b"[" + b"1," * BODY_ITEMS + b"1]",
        b"[" + b",".join([b"[" + b"1," * (BODY_ITEMS - 1) + b"1]"] * (BODY_VALUES // BODY_ITEMS)) + b"]",
        b"{" + b",".join(b'"%d":1' % i for i in range(BODY_ITEMS + 1)) + b"}",
        b"[" * 18 + b"]" * 18,
    ):
        with pytest.raises(ApiError) as refused:
            parse(text)
        assert refused.value.code == "body_too_complex"
    with pytest.raises(ApiError) as refused:
        cut_pictures(b'"' + b"a" * BODY_TEXT + b'"')
    assert refused.value.status_code == 413
    assert len(parse(b"[" + b"1," * (BODY_ITEMS - 1) + b"1]")) == BODY_ITEMS


def test_the_longest_text_is_taken_in_any_spelling(server):
    """32,000 characters, each of twelve bytes, are refused by the profile's slots and not by the body's bounds."""
    status, answer, _ = post(server, DRAW, json.dumps({"prompt": "\U0001f600" * 32_000}).encode())
    assert (status, "slots" in answer["error"]["message"]) == (400, True), answer


@pytest.mark.parametrize(
    "text",
    [
        '"data:',
        'say "data:image/png;base64,AAAA" to me',
        "data:image/png;base64,",
        '\\"data:;base64,\\',
        'data: ;base64, "what" is it?',
        "a;base64,b",
    ],
)
def test_texts_that_look_like_pictures(text):
    """They stay as they are, or are refused; nothing else is read in their place."""
    data = json.dumps({"prompt": text, "n": 1}).encode()
    cut, pictures = cut_pictures(data)
    if pictures:
        assert text.startswith("data:")
        with pytest.raises(ApiError, match="belongs into"):
            parse(cut, pictures)
    else:
        assert parse(cut, pictures) == {"prompt": text, "n": 1}


def test_pictures_are_cut_out():
    urls = [data_url(png(side)) for side in (8, 16)]
    data = json.dumps([{"url": url} for url in urls]).encode()
    cut, pictures = cut_pictures(data)
    assert len(cut) < 100
    assert [str(pictures[item["url"]], "ascii") for item in parse(cut, pictures)] == urls
    assert cut_pictures(b'"data:;base64,') == (b'"data:;base64,', {})


def test_base64_as_any_writer_escapes_it(server):
    """PHP escapes slashes, .NET plus signs."""
    picture = next(data for side in range(40, 80) if {43, 47} <= set(base64.b64encode(data := png(side, (side, 3, 7)))))
    body = json.dumps({"messages": ask(picture), "max_tokens": 4, "seed": 1})
    answers = set()
    for change in (
        {},
        {"/": "\\/"},
        {"+": "\\u002B", "=": "\\u003D"},
        {"+": "\\u002b", "/": "\\u002f", "=": "\\u003d"},
    ):
        escaped = body.split("base64,")
        escaped[1], end = escaped[1].split('"', 1)
        for plain, other in change.items():
            escaped[1] = escaped[1].replace(plain, other)
        status, answer, _ = post(server, CHAT, f'{"base64,".join(escaped)}"{end}'.encode())
        assert status == 200, answer
        answers.add(answer["choices"][0]["message"]["content"])
    assert len(answers) == 1


def test_large_bodies_wait_for_memory(server):
    """No more are read at a time than there is memory for; small ones pass by; and all are answered."""
    picture = png(64)
    padded = picture + bytes(LARGE - len(picture))
    body = json.dumps({"messages": ask(padded), "max_tokens": 3}).encode()
    total, least, results = server.service.bodies.left, [server.service.bodies.left], []

    def send():
        results.append(post(server, CHAT, body)[0])

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        least.append(server.service.bodies.left)
        time.sleep(0.002)
    assert results == [200] * 12
    assert 0 <= min(least) < len(body)  # it was used up
    assert server.service.bodies.left == total
    assert server.client().images.generate(prompt="a", extra_body=FEW).data


def test_a_data_url_elsewhere(server):
    with pytest.raises(openai.BadRequestError, match="belongs into"):
        server.client().images.generate(prompt=data_url(png(8)), extra_body=FEW)


def test_an_unknown_field_is_told_in_our_words(server):
    with pytest.raises(openai.BadRequestError, match="num_steps: no such field") as refused:
        server.client().images.generate(prompt="a", extra_body={"num_steps": 3})
    assert refused.value.param == "num_steps"
