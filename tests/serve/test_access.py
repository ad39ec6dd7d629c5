"""Keys, and which pages may call a server on loopback."""

import http.client
import os

import openai
import pytest
from serving import serving
from support import CHECKPOINT

from bagel_opt.cli.commands import main
from bagel_opt.cli.serving import cluster_settings
from bagel_opt.serve.access import Access, allowed_hosts, split_keys


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


def status(server, path="/v1/models", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse().status


def test_keys(model):
    with serving(model, keys=["first", "second"]) as server:
        for key in ("wrong", "firs", "FIRST", "none"):
            with pytest.raises(openai.AuthenticationError, match="valid API key"):
                server.client(key).models.list()
        for key in ("first", "second"):
            assert server.client(key).models.list().data
        for scheme in ("bearer first", "BEARER  second", "Bearer first "):
            assert status(server, Authorization=scheme) == 200, scheme
        for given in ("first", "Basic first", "Bearer", "Bearerfirst", "Bearer first second", ""):
            assert status(server, Authorization=given) == 401, given
        assert [status(server, path) for path in ("/health", "/ready", "/metrics")] == [200] * 3


@pytest.mark.parametrize("keys", [[""], ["a", ""], ["a b"], ["schlüssel"], ["\x00"], ["a\n"]])
def test_keys_that_no_header_can_carry(keys):
    with pytest.raises(ValueError, match="API key"):
        Access(tuple(keys))


@pytest.mark.parametrize(
    ("given", "variable", "keys"),
    [
        ([], None, ()),
        (["a"], None, ("a",)),
        ([], "a", ("a",)),
        (["c"], " a , b\n", ("c", "a", "b")),
        ([""], None, None),
        (["a", " "], None, None),
        ([], "", None),
        ([], ",", None),
        ([], "a,", None),
        (["a"], "", None),
    ],
)
def test_keys_of_the_command_line(given, variable, keys):
    """A shell variable that was not set does not open the server."""
    if keys is None:
        with pytest.raises(ValueError, match="an API key is empty"):
            split_keys(given, variable)
    else:
        assert split_keys(given, variable) == keys


@pytest.mark.parametrize(("option", "variable"), [("", None), ("key", ""), (None, ",")])
def test_an_empty_key_ends_the_command(monkeypatch, capsys, option, variable):
    for name in [name for name in os.environ if name == "BAGEL_OPT_API_KEYS"]:
        monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv("BAGEL_OPT_API_KEYS", variable)
    assert main(["serve", *(["--api-key", option] if option is not None else [])]) == 1
    assert "an API key is empty" in capsys.readouterr().err
    if option == "":
        with pytest.raises(ValueError, match="an API key is empty"):
            cluster_settings({"api-key": ""})


def test_hosts_and_origins_on_loopback(model):
    with serving(model, hosts=allowed_hosts("127.0.0.1", ["bagel.example.org"])) as server:
        port = server.port
        own = [
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            "localhost",
            f"[::1]:{port}",
            "LOCALHOST",
            "bagel.example.org:443",
        ]
        for host in own:
            assert status(server, "/health", Host=host) == 200, host
        for host in (
            "example.org",
            "127.0.0.1.example.org",
            f"example.org:{port}",
            "",
            "localhost:x",
            "localhost@a",
            "[::1",
        ):
            assert status(server, "/health", Host=host) == 403, host
        here = f"127.0.0.1:{port}"
        for origin in (f"http://{here}", "https://bagel.example.org"):
            assert status(server, Host=here, Origin=origin) == 200, origin
        for origin in (
            "http://example.org",
            "null",
            "http://127.0.0.1",
            "http://localhost:1",
            "file://",
            "http://[",
            here,
        ):
            assert status(server, Host=here, Origin=origin) == 403, origin


def test_hosts_elsewhere(model):
    """A server that others reach does not know its names, until it is told."""
    assert allowed_hosts("0.0.0.0") is allowed_hosts("bagel.example.org") is allowed_hosts("::") is None
    assert "bagel.example.org" in allowed_hosts("0.0.0.0", ["Bagel.example.org"])
    for local in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert {"localhost", "127.0.0.1", "[::1]"} <= allowed_hosts(local)
    assert "127.0.0.2" in allowed_hosts("127.0.0.2")
    for bad in ("", " ", "a:80", "http://a", "*"):
        with pytest.raises(ValueError, match="allowed-host"):
            allowed_hosts("127.0.0.1", [bad])
    with serving(model) as server:
        assert status(server, Host="example.org", Origin="http://example.net") == 200


def test_pages_of_other_origins(model):
    """Off by default; where an origin is named, with and without a preflight, and in errors too."""
    page, other = "https://page.example.org", "https://other.example.org:8443"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    def call(server, method, origin, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(method, "/v1/models", headers={"Origin": origin, **headers})
        answer = connection.getresponse()
        return answer.status, answer.headers["access-control-allow-origin"]

    with serving(model, hosts=allowed_hosts("127.0.0.1")) as server:
        assert call(server, "OPTIONS", page, **asked) == (403, None)
    with serving(model, hosts=allowed_hosts("127.0.0.1"), keys=["key"], origins=[page]) as server:
        assert call(server, "OPTIONS", page, **asked) == (200, page)
        assert call(server, "OPTIONS", page, **asked | {"Access-Control-Request-Method": "DELETE"}) == (200, page)
        assert call(server, "OPTIONS", other, **asked) == (400, None)
        assert call(server, "GET", page, Authorization="Bearer key") == (200, page)
        assert call(server, "GET", page) == (401, page)  # so that the page sees why
        assert call(server, "GET", other, Authorization="Bearer key") == (403, None)
    with serving(model, hosts=allowed_hosts("127.0.0.1"), origins=["*"]) as server:
        assert call(server, "GET", other) == (200, "*")
        assert status(server, Host="example.org", Origin=other) == 403  # a name that was made to point here


@pytest.mark.parametrize("origin", ["example.org", "https://a/", "https://", "", "null", "ftp://a"])
def test_origins_that_are_none(origin, capsys):
    with pytest.raises(ValueError, match="--cors-origin"):
        Access(origins=(origin,))
    assert main(["serve", "--cors-origin", origin]) == 1
    assert "--cors-origin" in capsys.readouterr().err
