"""The server with a Lance checkpoint: pictures, edits and questions."""

import base64
import dataclasses
import io

import numpy as np
import openai
import pytest
from lance_cases import CHECKPOINT, loaded
from PIL import Image
from serving import serving

import bagel_opt
from bagel_opt import Profile

FEW = {"num_timesteps": 3, "seed": 1}


@pytest.fixture(scope="module")
def running():
    profile = Profile("lance", rows=2, slots=8000, text=64, patches=2400, latents=2400)
    with serving(bagel_opt.load(CHECKPOINT, device="cpu", profile=profile)) as found:
        yield found


def picture(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def as_file(image):
    image.save(file := io.BytesIO(), "PNG")
    return "a.png", file.getvalue(), "image/png"


def test_a_picture_and_an_edit_of_it(running):
    client = running.client()
    drawn = picture(client.images.generate(prompt="a red ball", size="96x64", extra_body=FEW))
    want = loaded().generate("a red ball", height=64, width=96, **FEW)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(want)).max() <= 1
    edited = picture(
        client.images.edit(image=as_file(drawn), prompt="make it blue", extra_body={"num_timesteps": 2, "seed": 1})
    )
    assert edited.size == loaded().edit(drawn, "make it blue", num_timesteps=2, seed=1).size


def test_a_question(running):
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    url = "data:image/png;base64," + base64.b64encode(as_file(image)[1]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    said = {"model": "test", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    want = loaded().understand(image, "what is it?", max_think_tokens=6)
    assert running.client().chat.completions.create(**said).choices[0].message.content.strip() == want
    parts = running.client().chat.completions.create(**said, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices).strip() == want


TWO = [as_file(Image.new("RGB", (32, 32)))] * 2


@pytest.mark.parametrize(
    ("call", "param", "message"),
    [
        (lambda c: c.images.generate(prompt="a", extra_body={"think": True}), "think", "think=True: Lance has no such"),
        (lambda c: c.images.generate(prompt="a", size="1600x1600"), "size", "size: .* at most 1024 a side"),
        (
            lambda c: c.chat.completions.create(model="test", messages=[{"role": "user", "content": "hello"}]),
            "messages",
            "messages: Lance answers questions about a picture or a video",
        ),
        (lambda c: c.responses.create(model="test", input="hello"), "input", "input: Lance answers questions about a"),
        (
            lambda c: c.images.edit(image=TWO, prompt="a"),
            "image",
            "image: 1 texts and 2 pictures or videos; Lance takes",
        ),
    ],
)
def test_what_is_refused(running, call, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        call(running.client())
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda c: c.images.generate(prompt="a"), "model"),
        (lambda c: c.images.edit(image=TWO[:1], prompt="a"), "model"),
        (lambda c: c.responses.create(model="test", input="a", tools=[{"type": "image_generation"}]), "tools"),
        (
            lambda c: c.chat.completions.create(
                model="test", messages=[{"role": "user", "content": "a"}], extra_body={"modalities": ["image"]}
            ),
            "modalities",
        ),
    ],
)
def test_a_model_of_videos_names_what_asked_for_a_picture(running, monkeypatch, call, field):
    model = running.service.engine.model
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, draws=("video",)))
    with pytest.raises(
        openai.BadRequestError, match=f"{field}: output='image': this model was trained to draw"
    ) as refused:
        call(running.client())
    assert refused.value.param == field
