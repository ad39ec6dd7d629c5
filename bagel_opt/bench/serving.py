"""Loads a running server: `python -m bagel_opt.bench.serving URL`.

The same mixed requests go out twice, one at a time and then from many clients; every answer must be the same bytes.
"""

import argparse
import base64
import http.client
import io
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("star", "ring", "circle", "square")


@dataclass(frozen=True)
class Answer:
    """What came back, and when: seconds from sending. `content` is None where it failed."""

    kind: str
    content: str | None
    seconds: float


def requests(count: int, timesteps: int) -> list[tuple[str, str, dict]]:
    """(kind, path, body): of ten, six pictures, an edit and three questions; each with its own seed and words."""
    made = []
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((30, 30, 90, 90), fill="red")
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    part = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }
    for i in range(count):
        colour, shape = COLOURS[i % 4], SHAPES[i // 4 % 4]
        draw = {"modalities": ["image"], "num_timesteps": timesteps, "seed": i}
        kind = ("picture", "question", "picture", "edit", "picture")[i % 5] if i % 10 != 8 else "question"
        if kind == "picture":
            body = {"prompt": f"a large {colour} {shape} on the left", "num_timesteps": timesteps, "seed": i}
            made.append((kind, "/v1/images/generations", body))
            continue
        text = f"make the circle {colour}" if kind == "edit" else "what is in the image?"
        messages = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
        body = {"messages": messages, **(draw if kind == "edit" else {"temperature": 1, "seed": i})}
        made.append((kind, "/v1/chat/completions", body))
    return made


def send(url: str, kind: str, path: str, body: dict) -> Answer:
    parts, began = urlsplit(url), time.perf_counter()
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        data = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return Answer(kind, None, time.perf_counter() - began)
    content = None
    if response.status == 200:
        content = data["data"][0]["b64_json"] if "data" in data else json.dumps(data["choices"][0]["message"])
    return Answer(kind, content, time.perf_counter() - began)


def load(url: str, work: list[tuple[str, str, dict]], clients: int) -> tuple[list[Answer], float]:
    """All answers in order, and the seconds that they took together."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: send(url, *one), work))
    return answers, time.perf_counter() - began


def main() -> int:
    top = argparse.ArgumentParser("bagel_opt.bench.serving", description=__doc__)
    top.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    top.add_argument("--requests", type=int, default=200)
    top.add_argument("--clients", type=int, default=16)
    top.add_argument("--num-timesteps", type=int, default=25)
    a = top.parse_args()
    work = requests(a.requests, a.num_timesteps)
    load(a.url, work[:10], 1)  # loads the programs
    table = Table(
        "clients", "lost", "seconds", "requests/min", "pictures/min", "picture p50/p95 s", "question p50/p95 s"
    )
    found = []
    for clients in (1, a.clients):
        answers, seconds = load(a.url, work, clients)
        found.append(answers)
        lost, drawn = sum(x.content is None for x in answers), sum(x.kind != "question" for x in answers)
        columns = [
            str(clients),
            str(lost),
            f"{seconds:.1f}",
            f"{len(work) / seconds * 60:.0f}",
            f"{drawn / seconds * 60:.0f}",
        ]
        for question in (False, True):
            times = [x.seconds for x in answers if (x.kind == "question") is question]
            cuts = statistics.quantiles(times, n=20)
            columns.append(f"{cuts[9]:.2f} / {cuts[18]:.2f}")
        table.add_row(*columns)
    Console().print(table)
    different = sum(x.content != y.content for x, y in zip(*found, strict=True))
    print(f"{different} of {len(work)} answers differ from the same request's alone")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
