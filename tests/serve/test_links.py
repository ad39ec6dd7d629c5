"""Addresses of pictures, edits in JSON, data URLs in any spelling, names of the model, what there is to ask for."""

import base64
import http.client
import io
import json
import urllib.request

import numpy as np
import openai
import pytest
from PIL import Image
from serving import FEW, data_url, picture, png, serving
from support import CHECKPOINT

from bagel_opt.serve import links
from bagel_opt.serve.errors import ApiError
from bagel_opt.serve.pictures import decode_data_url

SMALL = {"height": 32, "width": 32, "seed": 1, **FEW}


@pytest.fixture(scope="module")
def server(load):
    with serving(load(CHECKPOINT, "onnx"), keys=["key"], names=("bagel", "gpt-image-1")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client("key")


def equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_an_address(client, server):
    """It needs no key, since pages show it; and it is no other picture than that in base64."""
    [plain] = client.images.generate(prompt="a", extra_body=SMALL).data
    linked = client.images.generate(prompt="a", n=2, response_format="url", output_format="webp", extra_body=SMALL)
    assert [one.b64_json for one in linked.data] == [None, None]
    for one in linked.data:
        assert one.url.startswith(f"{server.url}/pictures/")
        with urllib.request.urlopen(one.url) as answer:
            assert answer.headers["content-type"] == "image/webp"
            assert Image.open(io.BytesIO(answer.read())).size == (32, 32)
    [linked] = client.images.generate(prompt="a", response_format="url", extra_body=SMALL).data
    assert equal(Image.open(urllib.request.urlopen(linked.url)), picture(plain.b64_json))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(linked.url[:-5])
    with pytest.raises(openai.BadRequestError, match="a stream has b64_json"):
        client.images.generate(prompt="a", response_format="url", stream=True, extra_body=SMALL)


def test_addresses_hold_for_a_time_and_up_to_a_size(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(links.time, "monotonic", lambda: now[0])
    held = links.Links(seconds=10, most=100)
    first = held.keep(b"a" * 40, "png")
    now[0] = 5
    second = held.keep(b"b" * 60, "png")
    assert (held.get(first), held.get(second)) == (b"a" * 40, b"b" * 60)
    third = held.keep(b"c", "png")  # the oldest gives way
    assert (held.get(first), held.get(second), held.get(third)) == (None, b"b" * 60, b"c")
    now[0] = 15.1
    assert (held.get(second), held.get(third), held.left, len(held.held)) == (None, None, 100, 0)
    assert held.get(held.keep(b"d" * 101, "png")) is None
    assert held.left == 100


def test_replicas_give_no_address(load):
    with serving(load(CHECKPOINT, "onnx")) as server:
        object.__setattr__(server.service, "links", None)
        with pytest.raises(openai.BadRequestError, match="replicas give no addresses") as refused:
            server.client().images.generate(prompt="a", response_format="url", extra_body=SMALL)
        assert refused.value.param == "response_format"


def test_an_edit_in_json(client):
    """What openai's client sends as a form, as JSON has it."""
    both = [png(32), png(48, (0, 90, 200))]
    form = client.images.edit(image=both, prompt="merge", extra_body={"seed": 2, **FEW})
    images = [{"image_url": data_url(data)} for data in both]
    body = {"prompt": "merge", "images": images, "seed": 2, **FEW}
    answer = client.post("/images/edits", body=body, cast_to=object)
    assert answer["data"][0]["b64_json"] == form.data[0].b64_json
    body["images"][1]["image_url"] = "data:image/png;base64,AAAA"
    with pytest.raises(openai.BadRequestError, match="readable") as refused:
        client.post("/images/edits", body=body, cast_to=object)
    assert refused.value.param == "images.1.image_url"


def wrapped(text, end):
    return end.join(text[at : at + 76] for at in range(0, len(text), 76)) + end


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,", "data:application/octet-stream;base64,", "DATA:;base64,"])  # fmt: skip
@pytest.mark.parametrize("size", [2**10 - 1, 2**10, 2**10 + 1, 3 * 2**18, 3 * 2**18 + 4])
def test_spellings_of_data_urls(head, size):
    data = np.random.default_rng(0).bytes(size)
    plain = base64.b64encode(data).decode()
    for text in (plain, plain.rstrip("="), wrapped(plain, "\n"), wrapped(plain.rstrip("="), "\r\n")):
        assert decode_data_url((head + text).encode(), "url") == data
        assert decode_data_url(json.dumps(head + text)[1:-1].encode(), "url") == data


@pytest.mark.parametrize("text", ["data:image/png;base64,A", "data:image/png;base64,AA=A", "data:image/png;base64,A_-A", "data:image/png,AAAA", "file:///etc/passwd"])  # fmt: skip
def test_what_is_no_data_url(text):
    with pytest.raises(ApiError, match="url: not"):
        decode_data_url(text.encode(), "url")


def test_a_wrapped_picture_in_chat(client):
    answers = set()
    for url in (data_url(png(32)), "data:image/png;charset=x;base64," + wrapped(data_url(png(32)).split(",")[1], "\n")):
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        answer = client.chat.completions.create(
            model="bagel", messages=[{"role": "user", "content": parts}], max_tokens=5
        )
        answers.add(answer.choices[0].message.content)
    assert len(answers) == 1


def test_several_names(client):
    assert [model.id for model in client.models.list()] == ["bagel", "gpt-image-1"]
    assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
    for name in ("bagel", "gpt-image-1"):
        assert client.images.generate(prompt="a", model=name, extra_body=SMALL).data
        chat = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "a"}], max_tokens=2)
        assert chat.model == name
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; there is 'bagel', 'gpt-image-1'"):
        client.images.generate(prompt="a", model="other")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/files", 404), ("GET", "/v1/images/edits", 405)])
def test_what_there_is(server, method, path, status):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, headers={"Authorization": "Bearer key"})
    answer = connection.getresponse()
    assert answer.status == status
    message = json.loads(answer.read())["error"]["message"]
    assert message.startswith(f"there is no {method} {path}; there are ")
    for there in ("POST /v1/images/generations", "POST /v1/chat/completions", "GET /v1/models"):
        assert there in message
