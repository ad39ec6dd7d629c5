"""What the server refuses: sizes, bombs, and a thousand malformed requests."""

import contextlib
import http.client
import io
import json
import random
import struct
import zlib

import openai
import pytest
from PIL import Image
from serving import FEW, ask, png, serving
from support import CHECKPOINT

from bagel_opt.serve import Limits


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


@pytest.fixture(scope="module")
def server(model):
    limits = Limits(body_bytes=2**18, pixels=10**6, images=3, pictures=4, timesteps=50)
    with serving(model, limits=limits) as running:
        yield running


def call(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def post(server, body, path="/v1/images/generations"):
    return call(server, "POST", path, json.dumps(body), {"Content-Type": "application/json"})


def bomb(width, height):
    """A PNG that claims this size in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    )


def test_errors_of_http_have_the_same_format(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/../../etc/passwd", 404),
    ):
        found, headers, body = call(server, method, path)
        assert found == status, path
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert headers["x-request-id"]


def test_request_ids(server):
    for given, kept in (("abc-1.2_3", True), ("a" * 65, False), ("a b", False)):
        assert (call(server, "GET", "/health", headers={"x-request-id": given})[1]["x-request-id"] == given) is kept


def test_bodies_too_large(server):
    assert post(server, {"prompt": "a" * 2**18})[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Content-Type": "application/json"}  # in chunks, without saying how long
    connection.request("POST", "/v1/images/generations", iter([b'{"prompt": "'] + [b"a" * 2**16] * 5), headers)
    assert connection.getresponse().status == 413


def test_pictures_are_measured_before_they_are_decoded(server):
    for data in (bomb(30000, 30000), bomb(1001, 1000), bomb(2**31 - 1, 2**31 - 1)):
        with pytest.raises(openai.BadRequestError) as refused:
            server.client().images.edit(image=data, prompt="a", extra_body=FEW)
        assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="image"):
        server.client().images.edit(image=[png(16)] * 4, prompt="a", extra_body=FEW)
    with pytest.raises(openai.BadRequestError, match="3 that this server allows"):
        server.client().chat.completions.create(model="test", messages=ask(png(16)) * 4)


def test_formats_that_are_not_decoded(server):
    for name in ("gif", "bmp", "tiff", "ppm", "eps"):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, name)
        with pytest.raises(openai.BadRequestError, match="readable"):
            server.client().images.edit(image=buffer.getvalue(), prompt="a", extra_body=FEW)


def odd_pictures(rng, most):
    """Of all kinds that Pillow can write, some of them damaged."""
    good = []
    for kind in ("png", "jpeg", "webp", "tiff", "gif", "bmp", "ico"):
        for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
            for size in ((1, 1), (2, 200), (48, 32)):
                buffer = io.BytesIO()
                with contextlib.suppress(OSError, ValueError, SystemError):  # which it cannot
                    Image.new(mode, size).save(buffer, kind)
                    good.append(buffer.getvalue())
    for _ in range(most):
        data = bytearray(rng.choice(good))
        if rng.random() < 0.3:
            data = data[: rng.randrange(1, len(data))]
        elif rng.random() < 0.5:
            data[rng.randrange(len(data))] = rng.randrange(256)
        yield bytes(data)


def test_odd_pictures(server, thorough):
    """Three hundred, or thirty in the first tier: each is taken, or refused as what it is."""
    rng, found = random.Random(0), []
    for data in odd_pictures(rng, 300 if thorough else 30):
        status, _, answer = post(server, {"messages": ask(data), "max_tokens": 2}, "/v1/chat/completions")
        found.append(status)
        if status != 200:
            error = json.loads(answer)["error"]
            assert (status, error["param"]) == (400, "messages.0.content.1.image_url"), error
            assert error["message"].startswith(f"{error['param']}: ")
    assert set(found) == {200, 400}


def test_malformed_requests(server, thorough):
    """A thousand, or two hundred in the first tier. Every one is answered with a 4xx in the format of errors, and the server works afterwards."""
    rng, picture = random.Random(0), png(64)
    values = [None, True, -1, 0, 2**63, 2**200, 1e308, -0.5, "", "x", "1x1", "\x00", "\ud800", [], [[]], {}, {"a": 1}]
    names = [
        "prompt",
        "n",
        "size",
        "seed",
        "num_timesteps",
        "cfg_text_scale",
        "cfg_interval",
        "stream",
        "partial_images",
    ]
    names += [
        "height",
        "think",
        "max_think_tokens",
        "output_format",
        "timestep_shift",
        "step_cache",
        "unknown",
        "model",
    ]
    for _ in range(1000 if thorough else 200):
        kind = rng.randrange(5)
        if kind == 0:  # wrong values of known and unknown fields
            body = {"prompt": "a", "num_timesteps": 2, **{rng.choice(names): rng.choice(values) for _ in range(2)}}
            body["nonsense"] = rng.choice(values)
            status, _, answer = post(server, body)
        elif kind == 1:  # a picture cut off
            data = picture[: rng.randrange(1, len(picture) // 2)]
            status, _, answer = post(server, {"messages": ask(data)}, "/v1/chat/completions")
        elif kind == 2:  # bytes that are no JSON
            data = rng.randbytes(rng.randrange(1, 60))
            headers = {"Content-Type": rng.choice(["application/json", "text/plain", "multipart/form-data", "a/b;;"])}
            path = rng.choice(["/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"])
            status, _, answer = call(server, "POST", path, data, headers)
        elif kind == 3:  # forms
            parts = rng.choice(
                [b"", b"--b\r\n", b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--']
            )
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            status, _, answer = call(
                server, "POST", "/v1/images/edits", parts + rng.randbytes(rng.randrange(9)), headers
            )
        else:  # messages of any shape
            message = {"role": rng.choice(["user", "tool", None]), "content": rng.choice([*values, [{"type": "text"}]])}
            body = {"messages": rng.choice([[message], message, values]), "temperature": rng.choice([9, "a", -1])}
            status, _, answer = post(server, body, "/v1/chat/completions")
        assert 400 <= status < 500, (kind, answer)
        error = json.loads(answer)["error"]
        assert error["message"]
        assert error["param"] is None or error["param"] in error["message"]
    assert server.client().images.generate(prompt="a", extra_body=FEW).data
    assert server.rows_in_use() == 0
