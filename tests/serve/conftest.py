"""A server of the `model` that a file of tests names, unless it has one of its own."""

import pytest
from serving import serving


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()
