"""Two replicas of the shipped model on Ray Serve, through the command line and the openai client."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
from PIL import Image

import bagel_opt

pytest.importorskip("ray")
pytestmark = pytest.mark.second
COMMAND = [sys.executable, "-m", "bagel_opt", "serve", "--replicas", "2", "--max-queue", "8"]


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("ray") / "log").open("w+")
    process = subprocess.Popen([*COMMAND, "--port", str(port)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, (log.seek(0), log.read())[1]
            try:
                if json.loads(get(f"{url}/ready")) == {"status": "ready"}:
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
                time.sleep(0.5)
        yield process, url
    finally:
        process.kill()
        process.wait()
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"], capture_output=True)


def draw(url, seed, steps=12):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)
    body = {"seed": seed, "num_timesteps": steps}
    [found] = client.images.generate(prompt="a large red star", extra_body=body).data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found.b64_json))))


def together(calls):
    results = {}
    threads = [threading.Thread(target=lambda i=i, c=c: results.update({i: c()})) for i, c in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(calls))]


def test_replicas_share_the_work_and_answer_as_one(server):
    _, url = server
    pictures = together([lambda i=i: draw(url, seed=i // 2) for i in range(8)])
    model = bagel_opt.load()
    for i, picture in enumerate(pictures):
        assert np.array_equal(picture, pictures[i // 2 * 2])
        want = np.asarray(model.generate("a large red star", seed=i // 2, num_timesteps=12, height=128, width=128))
        assert np.abs(picture.astype(int) - want).max() <= 1
    drawn = {line for _ in range(40) for line in get(f"{url}/metrics").splitlines() if "bagel_pictures_total " in line}
    counts = {float(line.split()[-1]) for line in drawn if not line.startswith("#")}
    assert sum(counts) == 8 or counts == {4}  # each replica tells its own


def test_errors_and_streams_pass_through(server):
    _, url = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="cfg_interval"):
        client.images.generate(prompt="a ring", extra_body={"cfg_interval": [2, 1]})
    with pytest.raises(openai.BadRequestError, match="replicas give no addresses"):  # another would be asked for it
        client.images.generate(prompt="a ring", response_format="url")
    with pytest.raises(openai.BadRequestError, match="replicas keep no videos"):  # whatever the model
        client.get("/videos", cast_to=object)
    events = client.images.generate(prompt="a ring", stream=True, partial_images=1, extra_body={"num_timesteps": 4})
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds.count("progress") == 3
    assert kinds[-1] == "completed"
    assert "<title>" in get(url)


def test_sigterm_finishes_what_runs(server):
    process, url = server
    pictures = []
    drawing = threading.Thread(target=lambda: pictures.append(draw(url, seed=1, steps=120)))
    drawing.start()
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    drawing.join()
    assert pictures[0].shape == (128, 128, 3)
    assert process.wait(60) == 0


def test_what_cannot_be_loaded_starts_no_cluster():
    done = subprocess.run([*COMMAND, "/nowhere/at/all"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "/nowhere/at/all" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_replica_computes_on_its_gpus():
    from bagel_opt.cli.serving import cluster_settings

    def found(**given):
        settings = cluster_settings(given)
        return settings["load"].keywords["gpus"], settings["replicas"].gpus

    assert found(gpus_per_replica="2") == found(gpus="2") == found(gpus="2", gpus_per_replica="2") == (2, 2)
    assert found(gpus_per_replica="0.5") == (None, 0.5)
    assert found(gpus="2", device="cpu") == (2, 0)
    with pytest.raises(ValueError, match=r"--gpus-per-replica 2\.5: above 1, only whole numbers"):
        found(gpus_per_replica="2.5")
    with pytest.raises(ValueError, match="--gpus 2 with --gpus-per-replica 4: give one of them"):
        found(gpus="2", gpus_per_replica="4")


def test_options_of_a_config_file_are_those_of_the_command():
    from bagel_opt.cli.serving import cluster_settings

    found = cluster_settings({"max-replicas": "4", "gpus_per_replica": "0.5", "remote-images": "true", "timeout": "9"})
    assert (found["replicas"].least, found["replicas"].most, found["replicas"].gpus) == (1, 4, 0.5)
    assert (found["remote"], found["timeout"], found["names"]) == (True, 9, ["bagel-demo"])
    assert not cluster_settings({"remote-images": "false"})["remote"]
    with pytest.raises(ValueError, match="remote-images='maybe'; allowed are true and false"):
        cluster_settings({"remote-images": "maybe"})
