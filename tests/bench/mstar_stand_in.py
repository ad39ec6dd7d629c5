"""Stands in for M*'s server, in its HTTP API, on a hub's folder: python mstar_stand_in.py PORT HUB [--other N]

It writes and frames prompts as M* 0.2.1 does, which was compared with M*'s own code on a CPU. other: the token from which
its answers are wrong.
"""

import argparse
import base64
import io
import json
import threading
from email.message import EmailMessage
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

import bagel_opt

SYSTEM = "You are BAGEL, a helpful assistant created by ByteDance."
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            {
                "/v1/images/generations": self.draw,
                "/v1/images/edits": self.edit,
                "/v1/chat/completions": self.answer,
            }[self.path](data)
        except Exception as error:
            self.say(500, {"error": {"message": repr(error)}})

    def draw(self, data):
        self.picture(json.loads(data))

    def edit(self, data):
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form: EmailMessage = BytesParser(_class=EmailMessage).parsebytes(head + data)
        fields = {}
        for part in form.get_payload():
            content = part.get_payload(decode=True)
            name = part.get_param("name", header="content-disposition")
            try:
                fields[name] = content if part.get_filename() else json.loads(content)
            except ValueError:
                fields[name] = content.decode()
        self.picture(fields, Image.open(io.BytesIO(fields.pop("image"))))

    def picture(self, fields, image=None):
        own = {"num_timesteps": STEPS, **fields, "cfg_interval": tuple(fields["cfg_interval"])}
        with LOCK:
            drawn = MODEL.run([*([image] if image else []), own.pop("prompt")], **own)[-1]
        buffer = io.BytesIO()
        drawn.save(buffer, "png")
        self.say(200, {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode(), "url": None}]})

    def answer(self, data):
        body = json.loads(data)
        if not body["stream"] or body["temperature"] or body["repetition_penalty"] != 1.0:
            raise ValueError("not greedy, or with M*'s own penalty")
        [message] = body["messages"]
        parts = message["content"]
        inputs = [SYSTEM]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                inputs.append(part["text"])
            else:
                inputs.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))))
        with LOCK:
            text = MODEL.run(inputs, output="text", max_think_tokens=body["max_tokens"] + 1)[-1]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.event({"role": "assistant"})
        for index, word in enumerate(text.split()):
            self.event({"content": " aaaa" if index >= OTHER else f" {word}"})
        self.event({}, "stop")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, delta, reason=None):
        said = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())

    def say(self, status, data):
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    top = argparse.ArgumentParser()
    top.add_argument("port", type=int)
    top.add_argument("hub", type=Path)
    top.add_argument("--other", type=int, default=2**30)
    a = top.parse_args()
    [snapshot] = (a.hub / "models--ByteDance-Seed--BAGEL-7B-MoT" / "snapshots").iterdir()
    OTHER, STEPS = a.other, json.loads((snapshot / "config.json").read_text())["num_timesteps"]
    MODEL = bagel_opt.load(snapshot, device="cpu")
    ThreadingHTTPServer(("127.0.0.1", a.port), Handler).serve_forever()
