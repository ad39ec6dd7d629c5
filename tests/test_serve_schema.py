"""Requests that schemathesis makes from the server's own OpenAPI document: no server errors, answers as documented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from serving import serving
from support import CHECKPOINT

from bagel_opt.serve import Limits


@pytest.fixture(scope="module")
def api(load):
    with serving(load(CHECKPOINT, "onnx"), limits=Limits(timesteps=50, pictures=2)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/health"),
        ("GET", "/ready"),
    ],
)
def test_no_server_errors(api, method, path):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy())
    def check(case):
        case.call_and_validate(checks=[not_a_server_error, response_schema_conformance])

    check()
