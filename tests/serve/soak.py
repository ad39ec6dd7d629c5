"""A soak of the server, by hand: honest, stalling and malformed clients at its limits, all at once.

    python tests/serve/soak.py --minutes 30

It exports the model that ships, serves it, and prints what it saw as JSON: whether every honest answer was that of the
same request alone, how soon /health answered, the memory, the log, and how long a stop took.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import openai
from PIL import Image

from bagel_opt.export import export

FILES = 256  # that the server may have open: half of them connections
HONEST, MALFORMED, STALLING = 4, 2, 150
SERVE = ["--port", "0", "--max-queue", "8", "--timeout", "60", "--max-body", "16", "--profile"]


def png(side: int = 64, colour: tuple = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "png")
    return buffer.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Soak:
    def __init__(self, port: int, pid: int):
        self.port, self.pid, self.over = port, pid, threading.Event()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=120)
        self.expected: dict[int, str] = {}
        self.counts: dict[str, int] = {}
        self.lock = threading.Lock()
        self.health: list[float] = []
        self.memory: list[int] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    # ---- honest

    def ask(self, number: int) -> str:
        """One of twelve requests, and its answer as text."""
        options = {"seed": number, "num_timesteps": 6}
        if number % 3 == 0:
            return self.client.images.generate(prompt="a large red star", extra_body=options).data[0].b64_json
        if number % 3 == 1:
            picture = png(128, (30 * number % 255, 90, 200))
            return self.client.images.edit(image=picture, prompt="make it green", extra_body=options).data[0].b64_json
        parts = [{"type": "text", "text": "what color is it?"}, {"type": "image_url", "image_url": {"url": url(png())}}]
        said = self.client.chat.completions.create(
            model=self.client.models.list().data[0].id, messages=[{"role": "user", "content": parts}], max_tokens=20
        )
        return said.choices[0].message.content

    def honest(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.over.is_set():
            number = rng.randrange(12)
            try:
                self.count("equal" if self.ask(number) == self.expected[number] else "different")
            except openai.RateLimitError:
                self.count("told to come back")
                time.sleep(0.2)
            except openai.APIConnectionError:  # where all connections are taken, one that sent nothing yet makes room
                self.count("connection refused")
            except Exception as error:
                self.count(f"failed: {type(error).__name__} {error}"[:120])

    # ---- malformed

    def malformed(self, seed: int) -> None:
        rng = random.Random(seed)
        size = 4 * 2**20
        bodies = [
            b'{"messages":[' + b"{}," * (size // 3) + b"{}]}",
            b"[" * size,
            b'{"prompt":"' + b"\\u00e9" * (size // 6),
        ]
        bodies += [b"{" + b",".join(b'"%d":1' % i for i in range(size // 12)) + b"}", rng.randbytes(size), b"", b"{}"]
        bodies += [json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(data)}}]}]}).encode() for data in (png()[:60], rng.randbytes(size // 2))]  # fmt: skip
        while not self.over.is_set():
            path = rng.choice(["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/nothing"])
            kind = rng.choice(["application/json"] * 4 + ["multipart/form-data; boundary=b", "text/plain"])
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}{path}", rng.choice(bodies), {"Content-Type": kind}, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    self.count(f"malformed: {answer.status}")
            except urllib.error.HTTPError as error:
                self.count(f"malformed: {error.code}")
            except OSError:
                self.count("malformed: broken off")
            time.sleep(rng.random())

    # ---- stalling

    def stalling(self) -> None:
        """Half heads, half bodies and answers that nobody reads; whatever ends begins anew."""
        rng, open_ = random.Random(0), []
        draw = json.dumps({"prompt": "a", "stream": True, "partial_images": 3, "num_timesteps": 6}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        kinds = [
            b"",
            b"GET / HT",
            head,
            head + b"Content-Length: 15000000\r\n\r\n{",
            head + b"Content-Length: 50\r\n\r\n{",
        ]
        kinds += [head + b"Content-Length: %d\r\n\r\n" % len(draw) + draw]
        while not self.over.wait(0.1):
            for one in list(open_):
                with contextlib.suppress(BlockingIOError):
                    try:
                        ended = not one.recv(2**16) if rng.random() < 0.01 else rng.random() < 0.001
                    except OSError as error:
                        if isinstance(error, BlockingIOError):
                            raise
                        ended = True
                    if ended:
                        one.close()
                        open_.remove(one)
                        self.count("stalling: ended")
            while len(open_) < STALLING:
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                try:
                    one.connect(("127.0.0.1", self.port))
                    one.sendall(rng.choices(kinds, [20, 20, 20, 2, 20, 1])[0])
                    one.setblocking(False)
                    open_.append(one)
                except OSError:
                    one.close()
                    break
        self.left = open_

    # ---- what is measured

    def watch(self) -> None:
        for tick in itertools.count():
            if self.over.wait(0.05):
                return
            began = time.perf_counter()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30):
                    self.health.append(time.perf_counter() - began)
            except OSError:
                self.count("health: refused")
            if tick % 100 == 0:
                status = Path(f"/proc/{self.pid}/status").read_text()
                self.memory.append(
                    int(next(line for line in status.splitlines() if "VmRSS" in line).split()[1]) // 1024
                )

    def run(self, minutes: float) -> dict:
        self.expected = {number: self.ask(number) for number in range(12)}
        work = [(self.honest, n) for n in range(HONEST)] + [(self.malformed, n) for n in range(MALFORMED)]
        threads = [threading.Thread(target=target, args=(n,)) for target, n in work]
        threads += [threading.Thread(target=target) for target in (self.stalling, self.watch)]
        for thread in threads:
            thread.start()
        time.sleep(minutes * 60)
        self.over.set()
        for thread in threads:
            thread.join()
        fifth, health = len(self.memory) // 5, sorted(self.health)
        return {
            "minutes": minutes,
            "clients": dict(sorted(self.counts.items())),
            "health_ms": {
                "requests": len(health),
                "p50": round(statistics.median(health) * 1000, 1),
                "p99": round(health[len(health) * 99 // 100] * 1000, 1),
                "most": round(health[-1] * 1000, 1),
            },
            "memory_MiB": {
                "second fifth": statistics.median(self.memory[fifth : 2 * fifth]),
                "last fifth": statistics.median(self.memory[-fifth:]),
                "most": max(self.memory),
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(None, Path(folder) / "bundle", "demo")
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "bagel_opt", "serve", str(bundle), *SERVE[:-1]]
        with log.open("w") as file:
            server = subprocess.Popen(
                command, stderr=file, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
            )
        try:
            while "running on" not in log.read_text():
                time.sleep(0.2)
            said = next(json.loads(line)["message"] for line in log.read_text().splitlines() if "running on" in line)
            soak = Soak(int(said.rpartition(":")[2]), server.pid)
            found = soak.run(minutes)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.wait(120)
            found["stop_s"] = round(time.monotonic() - began, 1)
        finally:
            server.kill()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found["log_MB"] = round(os.path.getsize(log) / 1e6, 1)
        found["warnings_and_errors"] = sum(line["level"] in ("WARNING", "ERROR") for line in lines)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
