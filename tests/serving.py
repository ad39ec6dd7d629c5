"""A server in a thread of the test's process, on a runtime that tests can hold and let fail."""

import base64
import contextlib
import copy
import io
import threading
import time

import uvicorn
from openai import OpenAI
from PIL import Image

import bagel_opt
from bagel_opt.serve import Access, EngineThread, Limits, Metrics, Service, create_app
from bagel_opt.serve.connections import Connection

FEW = {"num_timesteps": 4}


class Held:
    """A runtime whose programs wait while it is closed, and raise where they are named in `failing`."""

    def __init__(self, runtime):
        self.runtime, self.open, self.failing = runtime, threading.Event(), {}
        self.open.set()

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def for_profile(self, profile):
        other = copy.copy(self)
        other.runtime = self.runtime.for_profile(profile)
        return other

    def run(self, program, *arguments):
        assert self.open.wait(60)
        if program in self.failing:
            raise self.failing[program]
        return self.runtime.run(program, *arguments)

    def __copy__(self):
        other = object.__new__(Held)
        other.__dict__.update(self.__dict__)  # the same events and failures
        return other


class Running:
    """A server that answers: its service, its runtime, its address and a client."""

    def __init__(self, service, runtime, server):
        self.service, self.runtime, self.connections = service, runtime, server.server_state.connections
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def engine(self):
        return self.service.engine

    def client(self, key="none"):
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def rows_in_use(self):
        engines = self.engine.engines.values()
        return sum(e.profile.rows * e.profile.batches - len(e.batches.free) for e in engines)


@contextlib.contextmanager
def serving(model, keys=(), limits=None, remote=False, hosts=None, origins=(), names=("test",), **settings):
    runtime = Held(model.runtime)
    model = bagel_opt.Model(runtime, model.config, model.tokenizer, model.profiles, examples=model.examples)
    service = Service(names, EngineThread(model, Metrics(), **settings), limits or Limits(), remote)
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, *arguments, **options):
            await super().startup(*arguments, **options)
            started.set()

    app = create_app(service, Access(tuple(keys), hosts, tuple(origins)))
    server = Server(
        uvicorn.Config(app, port=0, http=Connection, log_config=None, access_log=False, timeout_keep_alive=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(30)
    try:
        yield Running(service, runtime, server)
    finally:
        runtime.open.set()
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def until(condition, seconds=30):
    """Waits for what another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def png(side=64, colour=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "png")
    return buffer.getvalue()


def picture(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(data=None, text="what is it?"):
    parts = [{"type": "text", "text": text}]
    if data:
        parts.append({"type": "image_url", "image_url": {"url": data_url(data)}})
    return [{"role": "user", "content": parts}]
