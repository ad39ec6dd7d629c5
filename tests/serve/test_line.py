"""The line and the clock: both count from a request's arrival, its planning included."""

import gc
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image
from serving import FEW, png, serving, until
from support import CHECKPOINT

import bagel_opt
from bagel_opt.images import resize, to_rgb
from bagel_opt.sampling.pictures import read_image
from bagel_opt.serve import make_app
from bagel_opt.serve import service as services


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


class Planning:
    """A server's planning, held up until it is let go."""

    def __init__(self, monkeypatch, engine):
        self.open, self.running, real = threading.Event(), 0, engine.plan

        def plan(request, longest=None):
            self.running += 1
            assert self.open.wait(60)
            return real(request)

        monkeypatch.setattr(engine, "plan", plan)


def edit(server):
    return server.client().images.edit(image=png(32), prompt="a", extra_body={"seed": 1, **FEW})


def test_planning_takes_a_place_in_the_line(model, monkeypatch):
    with serving(model, max_queue=4) as server, ThreadPoolExecutor(12) as pool:
        planning = Planning(monkeypatch, server.engine)
        asked = [pool.submit(edit, server) for _ in range(4)]
        until(lambda: server.engine.planned == 4)
        for _ in range(8):
            with pytest.raises(openai.RateLimitError):
                edit(server)
        assert planning.running <= 2  # the others wait
        planning.open.set()
        assert len({answer.result().data[0].b64_json for answer in asked}) == 1
        assert server.engine.planned == 0


def test_planning_counts_in_the_timeout(model, monkeypatch):
    with serving(model, timeout=0.3) as server:
        planning, began = Planning(monkeypatch, server.engine), time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            for answer in [pool.submit(edit, server) for _ in range(4)]:  # two are planned, two wait for that
                assert answer.exception().status_code == 504
        assert time.monotonic() - began < 5
        assert server.engine.planned == 0
        planning.open.set()


def test_who_leaves_while_planning_gives_the_place_back(model, monkeypatch):
    with serving(model, max_queue=1) as server:
        planning = Planning(monkeypatch, server.engine)
        with pytest.raises(openai.APITimeoutError):
            server.client().with_options(timeout=0.3).images.edit(image=png(32), prompt="a", extra_body=FEW)
        until(lambda: server.engine.planned == 0)
        planning.open.set()
        assert edit(server).data


def test_ready_knows_whether_planning_goes_on(model, monkeypatch):
    monkeypatch.setattr(services, "STUCK", 0.1)
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        planning = Planning(monkeypatch, server.engine)
        assert server.service.status() == "ready"
        asked = pool.submit(edit, server)
        until(lambda: server.service.status() == "stuck")
        planning.open.set()
        assert asked.result().data
        assert server.service.status() == "ready"


def test_pictures_are_decoded_one_at_a_time(model, monkeypatch):
    """Four of an edit: none is held as large as it came when the next one is decoded."""
    seen, alive, real = [], [], services.decode_picture

    def decode(*arguments):
        gc.collect()
        alive.append(sum(one() is not None for one in seen))
        image = real(*arguments)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr(services, "decode_picture", decode)
    with serving(model) as server:
        assert server.client().images.edit(image=[png(640)] * 4, prompt="a", n=2, extra_body=FEW).data
    assert alive == [0] * 4  # and once for both pictures that were asked for


def test_a_picture_read_before_is_the_same(eager):
    """Also where the rule of sizes, applied twice, would change it again."""
    config = eager.config
    for size in ((640, 640), (1500, 20), (20, 1500), (64, 48)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
        try:
            read = read_image(image, config, "image")
        except ValueError:
            continue
        first = resize(to_rgb(image), config.vae_resize)
        assert read.size == (first.height, first.width)
        options = {"seed": 1, "num_timesteps": 3, "cfg_text_scale": 1.0}
        ours, theirs = (eager.run([one, "a"], output="image", **options)[0] for one in (read, image))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_rows_are_known_before_the_first_request(model):
    with serving(model) as server:
        rows = sum(profile.rows * profile.batches for profile in model.profiles)
        assert server.engine.metrics.registry.get_sample_value("bagel_rows") == rows > 0


def test_what_computes_is_a_metric_and_a_line_in_the_log(model, caplog):
    with caplog.at_level(logging.INFO, "bagel_opt.serve"):
        app = make_app(model, ["test"])
    logging.captureWarnings(False)  # as before
    app.state.service.close()
    told = {"version": bagel_opt.__version__, **model.runtime.active()}
    assert app.state.service.engine.metrics.registry.get_sample_value("bagel_info", told) == 1
    [record] = [record for record in caplog.records if record.getMessage().startswith("active: ")]
    assert record.fields == {"active": told}
    assert f"attention {told['attention']}; fused products none; compiler none" in record.getMessage()
