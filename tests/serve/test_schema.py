"""Requests that schemathesis makes from the server's own OpenAPI document: no server errors, answers as documented."""

import json

import fastjsonschema
import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from serving import serving
from support import CHECKPOINT, examples

from bagel_opt.serve import Limits, streams


@pytest.fixture(scope="module")
def server(load):
    with serving(load(CHECKPOINT, "onnx"), limits=Limits(timesteps=50, pictures=2)) as running:
        yield running


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos"),
        ("GET", "/v1/videos/{video_id}"),
        ("GET", "/v1/videos/{video_id}/content"),
        ("DELETE", "/v1/videos/{video_id}"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/health"),
        ("GET", "/ready"),
    ],
)
def test_no_server_errors(api, method, path):
    @settings(examples(40), suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy())
    def check(case):
        case.call_and_validate(checks=[not_a_server_error, response_schema_conformance])

    check()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {"prompt": "a", "partial_images": 1, "think": True, "max_think_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 4}),
    ],
)
def test_streams_send_what_the_document_says(server, path, body):
    document = httpx.get(f"{server.url}/openapi.json").json()
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    stream = body | {"stream": True} | ({"num_timesteps": 4} if "prompt" in body else {})
    lines = httpx.post(f"{server.url}{path}", json=stream, timeout=60).text.splitlines()
    found = [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    assert len(found) > 3
    validate = fastjsonschema.compile(content["text/event-stream"]["schema"]["properties"]["data"]["contentSchema"])
    for event in found:
        validate(event)
    with pytest.raises(fastjsonschema.JsonSchemaException):
        validate({"type": 1, "index": 1})


def test_a_stream_with_nothing_to_tell_says_that_it_lives(server, monkeypatch):
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.05)
    server.runtime.open.clear()
    body = {"prompt": "a", "stream": True, "num_timesteps": 4}
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": waiting"
        server.runtime.open.set()
        assert any(line == "event: image_generation.completed" for line in lines)
    assert server.rows_in_use() == 0
