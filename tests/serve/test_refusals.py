"""What clients send that asks for nothing is taken; what cannot be done is refused, naming the field as they wrote it."""

import http.client
import json

import pytest
from serving import FEW, data_url, png, serving
from support import CHECKPOINT

from bagel_opt.serve.chat_bodies import ChatBody
from bagel_opt.serve.image_bodies import EditBody, ImageBody, JsonEditBody

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
TEXT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
PICTURE = {"prompt": "a", "height": 32, "width": 32, **FEW}


@pytest.fixture(scope="module")
def server(load):
    with serving(load(CHECKPOINT, "onnx")) as running:
        yield running


def call(server, path, body, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def post(server, path, body):
    return call(server, path, json.dumps(body), {"Content-Type": "application/json"})


def form(server, *fields):
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
        for name, file, value in fields
    ]
    return call(server, EDIT, b"".join(parts) + b"--b--", {"Content-Type": "multipart/form-data; boundary=b"})


def text(name, value):
    return name, "", value.encode()


def file(name, data, filename="a.png"):
    return name, f'; filename="{filename}"', data


def test_null_is_absent(server):
    """In all fields but those that must be there."""
    for path, body, kind in ((CHAT, TEXT, ChatBody), (DRAW, PICTURE, ImageBody)):
        nulls = dict.fromkeys(kind.model_fields.keys() - body.keys() - {"cfg_interval"})
        assert {"n", "stream", "think"} <= nulls.keys()
        status, answer = post(server, path, nulls | body)
        assert status == 200, answer
    part = {"type": "text", "text": "a", "cache_control": None}
    message = {"role": "user", "content": [part], "images": None, "id": None, "tool_calls": None}
    assert post(server, CHAT, {**TEXT, "messages": [message], "stream_options": {"include_usage": None}})[0] == 200
    for field in ("messages", "prompt"):
        assert post(server, CHAT if field == "messages" else DRAW, {field: None})[1]["error"]["param"] == field


def test_the_document_says_so():
    for kind in (ChatBody, ImageBody, EditBody, JsonEditBody):
        schema = kind.model_json_schema()
        for name, field in schema["properties"].items():
            assert ({"type": "null"} in field.get("anyOf", ())) == (name not in schema["required"]), name


NOTHING = {"safety_identifier": "x", "prompt_cache_key": "x", "prompt_cache_retention": "24h", "user": "u"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (DRAW, PICTURE | NOTHING | {"quality": "high", "moderation": "low", "style": "vivid", "background": "opaque"}),
        (
            CHAT,
            TEXT
            | NOTHING
            | {"tool_choice": "none", "tools": [], "parallel_tool_calls": False, "logit_bias": {}, "top_logprobs": 0}
            | {"reasoning_effort": "low", "verbosity": "low", "n": 1, "logprobs": False, "service_tier": "auto"},
        ),
    ],
)
def test_what_changes_nothing_is_taken(server, path, body):
    status, answer = post(server, path, body)
    assert status == 200, answer


def test_an_empty_field_of_a_form_is_absent(server):
    empty = [text(name, "") for name in ("size", "mask", "n", "seed", "cfg_interval", "stop", "model")]
    few = [text("num_timesteps", "4"), text("prompt", "a")]
    files = [file("image[]", png(32)), file("mask", b"", "")]
    assert form(server, *files, *empty, *few)[0] == 200
    pairs = [text("cfg_interval[]", "0.2"), text("cfg_interval[]", "0.9")]
    twice = [text("cfg_interval", "0.2"), text("cfg_interval", "0.9")]
    answers = [
        form(server, file("image", png(32)), text("seed", "1"), *few, *given)[1]["data"][0]["b64_json"]
        for given in (pairs, twice, [text("cfg_interval", "[0.2, 0.9]")], [text("stop", "[")])
    ]
    assert answers[0] == answers[1] == answers[2] != answers[3]


def part(**fields):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, fields]}]}


URL = data_url(png(32))


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (CHAT, part(type="image_url", image_url=3), "messages.0.content.1.image_url", "must be an object"),
        (CHAT, part(type="image_url"), "messages.0.content.1.image_url", "missing"),
        (CHAT, part(type="image_url", image_url={}), "messages.0.content.1.image_url.url", "missing"),
        (CHAT, part(type="image_url", image_url={"url": URL, "detail": "huge"}), "messages.0.content.1.image_url.detail", "allowed: 'auto', 'low', 'high' or 'original'"),
        (CHAT, part(type="image_url", image_url="data:image/png;base64,AAAA"), "messages.0.content.1.image_url", "not a readable PNG, JPEG, WEBP picture"),
        (CHAT, part(type="input_audio", input_audio={}), "messages.0.content.1.type", "allowed: 'text', 'image_url'"),
        (CHAT, part(text="a"), "messages.0.content.1.type", "missing"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "must be a string or a list"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "allowed: 'system', 'developer', 'user' or 'assistant'"),
        (CHAT, {"messages": "a"}, "messages", "must be a list"),
        (CHAT, {}, "messages", "missing"),
        (CHAT, [], None, "must be an object"),
        (CHAT, TEXT | {"stop": [1]}, "stop.0", "must be a string"),
        (CHAT, TEXT | {"stop": 1}, "stop", "must be a string or a list"),
        (CHAT, TEXT | {"tools": [{}]}, "tools", "List should have at most 0 items, not 1"),
        (CHAT, TEXT | {"top_logprobs": 2}, "top_logprobs", "allowed: 0"),
        (CHAT, TEXT | {"guidance_scale": 2}, "guidance_scale", "BAGEL calls it cfg_text_scale"),
        (CHAT, TEXT | {"num_timesteps": 4}, "num_timesteps", 'only with modalities ["image"] or output "interleaved"'),
        (DRAW, PICTURE | {"num_inference_steps": 4}, "num_inference_steps", "BAGEL calls it num_timesteps, and counts one more"),
        (DRAW, PICTURE | {"n": "x"}, "n", "must be a whole number"),
        (DRAW, PICTURE | {"n": 0}, "n", "must be greater than or equal to 1"),
        (DRAW, PICTURE | {"think": "perhaps"}, "think", "must be true or false"),
        (DRAW, PICTURE | {"cfg_interval": 1}, "cfg_interval", "must be a list of two numbers, as [0.4, 1.0]"),
        (DRAW, PICTURE | {"lora": {"a": "x"}}, "lora.a", "must be a number"),
        (DRAW, {"prompt": "a", "size": "large"}, "size", 'must be "WIDTHxHEIGHT" or "auto"'),
        (DRAW, {"prompt": "a", "size": "33x32"}, "size", "width=33; allowed: a multiple of 16 pixels"),
        (DRAW, PICTURE | {"\u202e" + "x" * 99: 1}, "\\u202e" + "x" * 63, "no such field; /openapi.json lists them"),
        (EDIT, {"prompt": "a", "images": [{"image_url": URL}], "mask": {}}, "mask", "BAGEL cannot fill in a part; say in the prompt what to change"),
        (EDIT, {"prompt": "a", "images": [{"file_id": "x"}]}, "images.0.file_id", "no files are kept; give a data URL as image_url"),
        (EDIT, {"prompt": "a"}, "images", "missing"),
    ],
)  # fmt: skip
def test_the_field_is_named_as_it_was_written(server, path, body, param, message):
    status, answer = post(server, path, body)
    error = answer["error"]
    assert (status, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param or 'the body'}: {message}")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ([file("image", png(32)), file("image", b"x")], "image.1", "not a readable PNG, JPEG, WEBP picture"),
        ([file("image", b"x")], "image", "not a readable"),
        ([file("image", png(32)), file("mask", png(32))], "mask", "BAGEL cannot fill in a part"),
        ([file("other", png(32))], "other", "no such file"),
        ([text("image", "x")], "image", "must be a file"),
        ([text("seed", "1")], "image", "missing"),
        ([file("image", png(32)), text("cfg_interval", "0.4,1")], "cfg_interval", "must be a list of two numbers"),
        ([file("image", png(32)), text("n", "1"), text("n", "1")], "n", "given twice"),
    ],
)
def test_in_forms(server, fields, param, message):
    status, answer = form(server, *fields, text("prompt", "a"))
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(f"{param}: {message}")


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        (CHAT, '{"a":', "application/json", 400, "the body is not valid JSON: EOF while parsing"),
        (DRAW, "", "application/json", 400, "the body is empty; send a JSON object"),
        (DRAW, "{}", None, 415, "there is no Content-Type; send the body as application/json"),
        (DRAW, "{}", "text/plain", 415, "Content-Type is 'text/plain'; send the body as application/json"),
        (EDIT, "{}", "text/plain", 415, "Content-Type is 'text/plain'; send the body as application/json, or as multipart"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(server, path, body, kind, status, message):
    found, answer = call(server, path, body, {"Content-Type": kind} if kind else None)
    assert (found, answer["error"]["param"]) == (status, None)
    assert answer["error"]["message"].startswith(message)


def test_an_answer_as_long_as_there_is_room(server):
    """More tokens than fit are no fault of a client that does not know the profile."""
    for extra in ({}, {"output": "interleaved", "height": 32, "width": 32, **FEW}):
        status, answer = post(
            server, CHAT, TEXT | {"max_tokens": 10**6, "seed": 2} | extra
        )  # whose text is no longer when it is read again
        assert (status, answer["choices"][0]["finish_reason"]) == (200, "length"), answer
        slots = max(profile.slots for profile in server.engine.engines)
        assert slots / 4 < answer["usage"]["completion_tokens"] < 2 * slots
    status, answer = post(server, CHAT, TEXT | {"max_tokens": 3})
    assert answer["usage"]["completion_tokens"] == 3
