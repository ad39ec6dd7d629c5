"""A server of the `model` that a file of tests names, unless it has one of its own; a browser."""

import pytest
from serving import serving


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    from browsing import chromium  # which skips what it is needed for

    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver
