"""The openai client, unchanged, against the server: pictures, edits, answers, streams, errors."""

import io
import json

import numpy as np
import openai
import pytest
from PIL import Image
from serving import FEW, ask, data_url, picture, png, serving
from support import CHECKPOINT

from bagel_opt.serve import Limits


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


def equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_generate(client, model):
    answer = client.images.generate(
        prompt="a red circle", model="test", n=2, size="96x64", user="u", quality="high", extra_body={"seed": 3, **FEW}
    )
    want = [model.generate("a red circle", width=96, height=64, seed=seed, **FEW) for seed in (3, 4)]
    assert [equal(picture(d.b64_json), w) for d, w in zip(answer.data, want, strict=True)] == [True, True]
    assert [d.seed for d in answer.data] == [3, 4]
    assert answer.size == "96x64"
    assert answer.usage.output_tokens == 2 * 4 * 6
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_formats(client):
    for name in ("jpeg", "webp"):
        body = {"seed": 3, **FEW}
        answer = client.images.generate(prompt="a", output_format=name, output_compression=60, extra_body=body)
        assert picture(answer.data[0].b64_json).format == name.upper()


def test_partial_images(client):
    options = {"prompt": "a", "extra_body": {"seed": 1, **FEW}}
    events = list(client.images.generate(stream=True, partial_images=2, **options))
    assert [e.type.split(".")[1] for e in events] == ["progress", "partial_image"] * 2 + ["progress", "completed"]
    assert [e.partial_image_index for e in events if "partial" in e.type] == [0, 1]
    assert [(e.index, e.total) for e in events if "progress" in e.type] == [(0, 3), (1, 3), (2, 3)]
    assert events[-1].b64_json == client.images.generate(**options).data[0].b64_json
    assert picture(events[1].b64_json).size == picture(events[-1].b64_json).size
    assert events[-1].usage.total_tokens > 0


def test_the_last_estimate_is_the_picture(client):
    """x_t - t * v_t of the only flow step is where the step ends."""
    body = {"seed": 1, "num_timesteps": 2}
    events = list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=body))
    assert [e.type for e in events][-2:] == ["image_generation.partial_image", "image_generation.completed"]
    assert np.abs(np.subtract(*(np.asarray(picture(e.b64_json), int) for e in events[-2:]))).max() <= 1


def test_edit(client, model):
    first, second = png(64), png(96, (0, 90, 200))
    body = {"seed": 2, "cfg_interval": [0.2, 0.9], "cfg_img_scale": 1.2, **FEW}
    answer = client.images.edit(image=first, prompt="make it green", extra_body=body)
    options = {"seed": 2, "cfg_interval": (0.2, 0.9), "cfg_img_scale": 1.2, **FEW}
    want = model.edit(Image.open(io.BytesIO(first)), "make it green", **options)
    assert equal(picture(answer.data[0].b64_json), want)
    events = list(client.images.edit(image=[first, second], prompt="merge", stream=True, extra_body={"seed": 2, **FEW}))
    want = model.run([Image.open(io.BytesIO(first)), Image.open(io.BytesIO(second)), "merge"], seed=2, **FEW)[0]
    assert events[-1].type == "image_edit.completed"
    assert equal(picture(events[-1].b64_json), want)


def test_think(client):
    body = {"seed": 1, "think": True, "max_think_tokens": 6, **FEW}
    answer = client.images.generate(prompt="a", extra_body=body)
    assert isinstance(answer.data[0].thought, str)
    events = list(client.images.generate(prompt="a", stream=True, extra_body=body))
    assert events[-1].thought == answer.data[0].thought
    assert answer.usage.output_tokens_details.text_tokens <= 5


def test_answer_about_a_picture(client, model):
    image = Image.open(io.BytesIO(png()))
    answer = client.chat.completions.create(model="test", messages=ask(png()), max_completion_tokens=7)
    assert answer.choices[0].message.content == model.understand(image, "what is it?", max_think_tokens=8)
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens > 20


def test_sampled_answers_repeat_with_the_seed(client, model):
    answers = [
        client.chat.completions.create(
            model="test", messages=ask(text="hello"), seed=9, temperature=1.5, top_p=0.9, max_tokens=9
        )
        for _ in range(2)
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    options = {"seed": 9, "do_sample": True, "text_temperature": 1.5, "max_think_tokens": 10}
    want = model.chat("hello", top_p=0.9, **options)
    assert texts == [want, want]
    assert want != model.chat("hello", **options)


def test_streamed_answer(client):
    options = {"model": "test", "messages": ask(png()), "max_tokens": 12}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


@pytest.mark.parametrize("stop", ["{0}", ["never", "{0}"], ["never"], []])
def test_stop(client, model, stop):
    text = model.chat("hello", max_think_tokens=30)
    place = next(i for i in range(8, 20) if "\ufffd" not in text[i : i + 2])
    stop = json.loads(json.dumps(stop).replace("{0}", json.dumps(text[place : place + 2])[1:-1]))
    options = {"model": "test", "messages": ask(text="hello"), "max_tokens": 29, "stop": stop}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == model.chat("hello", max_think_tokens=30, stop=stop)
    stopped = text[place : place + 2] in stop
    assert (len(answer.choices[0].message.content) < len(text)) == stopped
    assert answer.choices[0].finish_reason == ("stop" if stopped else "length")
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_sides_and_prompts_of_ones_own(client, model):
    image = Image.open(io.BytesIO(png()))
    options = {"vit_min_size": 84, "system_prompt": "Look well."}
    answer = client.chat.completions.create(model="test", messages=ask(png()), max_tokens=7, extra_body=options)
    plain = client.chat.completions.create(model="test", messages=ask(png()), max_tokens=7)
    want = model.understand(image, "what is it?", max_think_tokens=8, **options)
    assert answer.choices[0].message.content == want
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 10
    options = {"vae_max_size": 48, "vit_max_size": 42, "seed": 1, **FEW}
    edited = client.images.edit(image=png(), prompt="a", extra_body=options)
    assert equal(picture(edited.data[0].b64_json), model.edit(image, "a", **options))
    assert edited.size == "48x48"


def test_picture_in_chat_and_back(client):
    body = {"modalities": ["image"], **FEW}
    options = {"model": "test", "seed": 4, "extra_body": body}
    answer = client.chat.completions.create(messages=ask(text="a red circle"), **options)
    url = answer.choices[0].message.images[0]["image_url"]["url"]
    direct = client.images.generate(prompt="a red circle", extra_body={"seed": 4, **FEW})
    assert url == "data:image/png;base64," + direct.data[0].b64_json
    chunks = list(client.chat.completions.create(messages=ask(text="a red circle"), stream=True, **options))
    assert [c.choices[0].delta.images[0]["image_url"]["url"] for c in chunks if c.choices[0].delta.model_extra] == [url]
    history = [*ask(text="a red circle"), answer.choices[0].message.model_dump(), *ask(text="make it green")]
    edited = client.chat.completions.create(messages=history, **options)
    assert edited.choices[0].message.images[0]["image_url"]["url"] != url


TURNS = {"output": "interleaved", "num_timesteps": 4, "max_rounds": 2, "interleaved_context": "main", "draw_marker": ""}
OURS = {**TURNS, "seed": 3, "max_think_tokens": 7}


def parts_of(content):
    return [
        part["text"] if part["type"] == "text" else picture(part["image_url"]["url"].split(",")[1]) for part in content
    ]


def test_interleaved(client, model):
    """Texts and pictures as parts of the content, streamed the same ones in the same order."""
    image = Image.open(io.BytesIO(png()))
    options = {"model": "test", "seed": 3, "max_tokens": 6, "extra_body": TURNS}
    answer = client.chat.completions.create(messages=ask(png()), **options)
    parts, want = parts_of(answer.choices[0].message.content), model.run([image, "what is it?"], **OURS)
    assert [type(part) for part in want] == [str, Image.Image] * 2
    assert parts[::2] == want[::2]
    assert all(equal(a, b) for a, b in zip(parts[1::2], want[1::2], strict=True))
    assert answer.choices[0].finish_reason == "length"  # no more rounds were allowed
    assert answer.usage.completion_tokens > 2 * 16
    chunks = list(client.chat.completions.create(messages=ask(png()), stream=True, stream_options={"include_usage": True}, **options))  # fmt: skip
    content, progress = [], []
    for chunk in chunks[:-1]:
        delta = chunk.choices[0].delta
        if delta.content and content and content[-1]["type"] == "text":
            content[-1]["text"] += delta.content
        elif delta.content:
            content.append({"type": "text", "text": delta.content})
        content += getattr(delta, "images", None) or []
        if found := getattr(chunk, "progress", None):
            progress.append((found["round"], found["index"], found["total"], len(content)))
    assert content == answer.choices[0].message.content
    assert progress == [(round, index, 3, 2 * round + 1) for round in range(2) for index in range(3)]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == answer.usage


def test_an_interleaved_answer_may_be_sent_back(client, model):
    options = {"model": "test", "seed": 3, "max_tokens": 6, "extra_body": {**TURNS, "max_rounds": 1}}
    first = client.chat.completions.create(messages=ask(text="hello"), **options).choices[0].message
    text, drawn = parts_of(first.content)
    history = [*ask(text="hello"), {"role": "assistant", "content": first.content}, *ask(text="and then?")]
    answer = client.chat.completions.create(model="test", messages=history, max_tokens=6)
    want = model.run(["hello", drawn, text, "and then?"], output="text", max_think_tokens=7)
    assert answer.choices[0].message.content == want[0]  # of one text, pictures come first


def test_an_interleaved_answer_that_ends_by_itself(client, model):
    text = model.run("hello", **{**OURS, "max_rounds": 1})[0]
    for stop, marker, reason in (([text[:2]], "", "length"), (None, "never", "length")):
        body = {**TURNS, "draw_marker": marker}
        options = {"model": "test", "seed": 3, "max_tokens": 6, "stop": stop, "extra_body": body}
        answer = client.chat.completions.create(messages=ask(text="hello"), **options)
        assert answer.choices[0].message.content == [{"type": "text", "text": text}]
        assert answer.choices[0].finish_reason == reason  # the text itself was cut
        chunks = list(client.chat.completions.create(messages=ask(text="hello"), stream=True, **options))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_more_rounds_than_the_server_allows(model):
    body = {"output": "interleaved", "height": 32, "width": 32, "seed": 3, **FEW}
    with serving(model, limits=Limits(pictures=2)) as running:
        create = running.client().chat.completions.create
        options = {"model": "test", "messages": ask(text="hello"), "max_tokens": 4}
        assert len(create(**options, extra_body=body).choices[0].message.content) == 4
        with pytest.raises(openai.BadRequestError, match="max_rounds: 3 is more than the 2") as refused:
            create(**options, extra_body={**body, "max_rounds": 3})
        assert refused.value.param == "max_rounds"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["test"]
    assert client.models.retrieve("test").id == "test"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"size": "100x64"}, "size"),
        ({"size": "6400x6400"}, "size"),
        ({"size": "big"}, "size"),
        ({"n": 99}, "n"),
        ({"n": 0}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "word " * 3000}, None),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"extra_body": {"num_timesteps": 10**6}}, "num_timesteps"),
        ({"extra_body": {"num_timesteps": "many"}}, "num_timesteps"),
        ({"extra_body": {"cfg_text_scale": -1}}, "cfg_text_scale"),
        ({"extra_body": {"cfg_interval": [0.9, 0.1]}}, "cfg_interval"),
        ({"extra_body": {"height": 64}}, "width"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_what_cannot_be_done_is_refused(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a", "model": "test", **options})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param
    assert refused.value.body["message"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"messages": []}, 400),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400),
        ({"messages": [{"role": "user", "content": []}]}, 400),
        ({"top_p": 1.5}, 400),
        ({"n": 2}, 400),
        ({"stop": ["a"] * 5}, 400),
        ({"stop": ""}, 400),
        ({"modalities": ["audio"]}, 400),
        ({"extra_body": {"cfg_text_scale": 2}}, 400),
        ({"extra_body": {"max_rounds": 2}}, 400),
        ({"extra_body": {"output": "text"}}, 400),
        ({"extra_body": {"output": "interleaved", "max_rounds": 9}}, 400),
        ({"extra_body": {"output": "interleaved", "height": 64}}, 400),
        ({"extra_body": {"output": "interleaved"}, "modalities": ["image"]}, 400),
        ({"extra_body": {"output": "interleaved", "max_rounds": 8}, "max_tokens": 500}, 400),
        ({"temperature": 1, "extra_body": {"do_sample": True}}, 400),
        ({"extra_body": {"max_think_tokens": 10**6}}, 400),
        ({"model": "gpt-4"}, 404),
    ],
)
def test_what_chat_refuses(client, options, status):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "test", "messages": ask(text="a"), **options})
    assert refused.value.status_code == status
    assert refused.value.body["message"]


def test_the_size_of_an_edit(client, model):
    """That of its picture as it is read, what was asked for, or that of its picture as it came."""
    image = Image.open(io.BytesIO(png(50)))
    options = {"seed": 1, **FEW}
    for size, own, told in (
        ("auto", {}, "48x48"),
        ("128x64", {"width": 128, "height": 64}, "128x64"),
        ("input", {"size": "input"}, "50x50"),
    ):
        answer = client.images.edit(image=png(50), prompt="a", size=size, extra_body=options)
        assert equal(picture(answer.data[0].b64_json), model.edit(image, "a", **own, **options))
        assert answer.size == told
    body = {"modalities": ["image"], "size": "input", **options}
    drawn = client.chat.completions.create(model="test", messages=ask(png(50), "a"), extra_body=body)
    url = drawn.choices[0].message.images[0]["image_url"]["url"]
    assert picture(url.partition(",")[2]).size == (50, 50)
    assert drawn.usage.completion_tokens == 9  # as many as were drawn
    with pytest.raises(openai.BadRequestError, match="size='input'; allowed only with an input picture") as refused:
        client.images.generate(prompt="a", size="input", extra_body=FEW)
    assert refused.value.param == "size"
    with pytest.raises(openai.BadRequestError, match="height=100; allowed: a multiple of 16") as refused:
        client.images.edit(image=png(), prompt="a", size="128x100", extra_body=FEW)
    assert refused.value.param == "size"


def test_masks_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="mask"):
        client.images.edit(image=png(64), mask=png(64), prompt="a", extra_body=FEW)


def test_pictures_that_are_none(client):
    for url in ("http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,####", data_url(png()[:60])):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="test", messages=[{"role": "user", "content": parts}])
        assert refused.value.param.startswith("messages")
