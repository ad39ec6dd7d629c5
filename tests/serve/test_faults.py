"""Clients that vanish or dawdle, a full queue, programs that raise, signals: nothing is lost but what its client gave up."""

import gc
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image
from serving import FEW, ask, png, serving, until
from support import CHECKPOINT

LONG = {"num_timesteps": 150}


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


@pytest.fixture
def server(model):
    with serving(model, max_queue=8) as running:
        yield running


def post(server, body, path="/v1/images/generations"):
    """Sends a request and leaves its answer unread."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_vanish(server, stream):
    """While they run and while they wait: rows and places in line are free again, and others go on."""
    server.runtime.open.clear()
    gone = [post(server, {"prompt": "a", "stream": stream, **LONG}) for _ in range(6)]
    until(lambda: len(server.engine.tickets) == 6)
    for connection in gone:
        connection.close()
    with ThreadPoolExecutor() as pool:
        stays = pool.submit(server.client().images.generate, prompt="a", extra_body={"seed": 1, **FEW})
        until(lambda: server.engine.commands.qsize() >= 6)
        server.runtime.open.set()
        assert stays.result().data
    until(lambda: not server.engine.tickets)
    assert server.rows_in_use() == 0
    failures = server.engine.metrics.registry.get_sample_value("bagel_failures_total", {"error": "CancelledError"})
    assert failures == 6


def test_slow_readers_hold_up_nobody(server):
    """Streams that nobody reads: their pictures are drawn to the end, and others are served meanwhile."""
    body = {"prompt": "a", "stream": True, "partial_images": 3, "seed": 1, **FEW}
    slow = [post(server, body) for _ in range(5)]
    assert server.client().images.generate(prompt="a", extra_body={"seed": 1, **FEW}).data
    until(lambda: not server.engine.tickets)
    assert server.rows_in_use() == 0
    for connection in slow:
        connection.settimeout(10)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert b"image_generation.completed" in answer.read()
        connection.close()


def test_full_queue(server):
    server.runtime.open.clear()
    client = server.client()
    with ThreadPoolExecutor(8) as pool:
        ask_for = lambda: client.images.generate(prompt="a", extra_body={"seed": 1, **FEW})  # noqa: E731
        accepted = [pool.submit(ask_for) for _ in range(7)]
        until(lambda: len(server.engine.tickets) == 7)
        with pytest.raises(openai.RateLimitError):  # all of them or none
            client.images.generate(prompt="a", n=2, extra_body=FEW)
        accepted.append(pool.submit(ask_for))
        until(lambda: len(server.engine.tickets) == 8)
        with pytest.raises(openai.RateLimitError) as refused:
            ask_for()
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        server.runtime.open.set()
        assert len({answer.result().data[0].b64_json for answer in accepted}) == 1


def test_deadline(model):
    with serving(model, timeout=0.1) as server:
        with pytest.raises(openai.InternalServerError) as late:
            server.client().images.generate(prompt="a", extra_body={"num_timesteps": 200})
        assert late.value.status_code == 504
        assert late.value.code == "deadline_exceeded"
        until(lambda: server.rows_in_use() == 0)


def test_a_program_that_raises(server):
    """Its requests fail, others do not; after three in a row the server is not ready, until one succeeds."""
    client = server.client()
    server.runtime.failing.update(dict.fromkeys(("generate", "generate_row"), RuntimeError("secret detail")))
    for count in range(3):
        assert status(server, "/ready") == 200, count
        with pytest.raises(openai.InternalServerError) as failed:
            client.images.generate(prompt="a", extra_body=FEW)
        assert "secret" not in str(failed.value)
    assert (status(server, "/ready"), status(server, "/health")) == (503, 200)
    with pytest.raises(openai.APIError, match="failed"):
        list(client.images.generate(prompt="a", stream=True, extra_body=FEW))
    assert client.chat.completions.create(model="test", messages=ask(text="a"), max_tokens=3).choices
    assert status(server, "/ready") == 200
    server.runtime.failing.clear()
    assert client.images.generate(prompt="a", extra_body=FEW).data


def test_a_fault_of_the_engine_itself(server, monkeypatch):
    [engine] = server.engine.engines.values()
    monkeypatch.setattr(engine, "_admits", lambda plan: 1 / 0)
    with pytest.raises(openai.InternalServerError):
        server.client().images.generate(prompt="a", extra_body=FEW)
    monkeypatch.undo()
    assert server.client().images.generate(prompt="a", extra_body=FEW).data


def test_an_overflow_is_the_requests_own_fault(server):
    server.runtime.failing["vae_decode"] = FloatingPointError("the picture overflowed; use smaller guidance scales")
    for _ in range(4):
        with pytest.raises(openai.BadRequestError, match="overflowed"):
            server.client().images.generate(prompt="a", extra_body=FEW)
    assert status(server, "/ready") == 200


def test_a_device_that_is_full(server):
    """Its request ends with what to do, and the server goes on."""
    full = "the GPU's memory is full (program 'generate'); use a smaller height and width"
    server.runtime.failing.update(dict.fromkeys(("generate", "generate_row"), MemoryError(full)))
    for _ in range(4):
        with pytest.raises(openai.InternalServerError, match="use a smaller height and width") as failed:
            server.client().images.generate(prompt="a", extra_body=FEW)
        assert (failed.value.status_code, failed.value.code) == (503, "out_of_memory")
    assert status(server, "/ready") == 200
    server.runtime.failing.clear()
    assert server.client().images.generate(prompt="a", extra_body=FEW).data


def test_a_lost_gpu_of_several(server):
    """Which loses the model: the server is no longer ready, at once."""
    lost = ChildProcessError("rank 1 (process 7) ended by signal 9 (SIGKILL): load the model again")
    server.runtime.failing.update(dict.fromkeys(("generate", "generate_row"), lost))
    with pytest.raises(openai.InternalServerError, match="has lost one of its GPUs") as failed:
        server.client().images.generate(prompt="a", extra_body=FEW)
    assert (failed.value.status_code, failed.value.code) == (503, "gpu_lost")
    assert status(server, "/ready") == 503


def status(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", path)
    return connection.getresponse().status


def test_nothing_leaks(model, thorough):
    """600 (first tier: 150) small requests of all kinds, some given up half-way: no rows, no tickets, no memory."""
    with serving(model, max_queue=64) as server:
        rng, lock, done = random.Random(0), threading.Lock(), []

        def one(_):
            with lock:
                kind, vanish = rng.randrange(3), rng.random() < 0.1
            body = {"prompt": "a", "num_timesteps": 2, "height": 32, "width": 32}
            path, chat = "/v1/images/generations", {"messages": ask(png(32) if kind == 1 else None), "max_tokens": 3}
            if kind < 2:
                path, body = "/v1/chat/completions", chat
            connection = post(server, body | {"stream": kind == 0}, path)
            if not vanish:
                connection.settimeout(60)
                answer = http.client.HTTPResponse(connection)
                answer.begin()
                assert answer.status == 200
                assert answer.read()
            connection.close()
            done.append(vanish)

        def batch(count):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(one, range(count)))
            until(lambda: not server.engine.tickets)
            gc.collect()

        most = 600 if thorough else 150
        batch(most // 5)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        batch(most - most // 5)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert len(done) == most
        assert grown < 2**20
        assert server.rows_in_use() == 0
        assert not server.engine.running


def test_sigterm_finishes_what_runs(bundle, tmp_path):
    """Under load: what was accepted is answered, then the process ends."""
    command = [sys.executable, "-m", "bagel_opt", "serve", str(bundle), "--port", "0"]
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "BAGEL_OPT_API_KEYS": "k1,k2"})
        try:

            def lines():
                return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line[:1] == "{"]

            def port():
                found = [line["message"] for line in lines() if "running on" in line["message"]]
                return int(found[0].split()[3].rsplit(":", 1)[1]) if found else None

            until(port, 60)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port()}/v1", api_key="k2", max_retries=0)
            client.images.edit(image=strange_jpeg(), prompt="a", extra_body=FEW)
            with ThreadPoolExecutor(6) as pool:
                running = [
                    pool.submit(client.images.generate, prompt="secret prompt", extra_body={"seed": 1, **LONG})
                    for _ in range(6)
                ]
                metrics = f"http://127.0.0.1:{port()}/metrics"
                until(lambda: waiting_and_running(metrics) == 6)
                process.send_signal(signal.SIGTERM)
                assert len({answer.result().data[0].b64_json for answer in running}) == 1
            assert process.wait(30) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
    answered = [line for line in lines() if line.get("path") == "/v1/images/generations"]
    assert [line["status"] for line in answered] == [200] * 6
    text = (tmp_path / "log").read_text()
    assert "secret prompt" not in text
    said = [json.loads(line) for line in text.splitlines()]  # all of it is JSON
    assert any("EXIF" in line["message"] for line in said)


def strange_jpeg():
    """Pillow reads it, and warns of its EXIF data."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 32)).save(buffer, "jpeg", exif=exif.tobytes()[:-3])
    return buffer.getvalue()


def waiting_and_running(url):
    import urllib.request

    text = urllib.request.urlopen(url).read().decode()
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("bagel_requests_"))
