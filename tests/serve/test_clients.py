"""Other clients, unchanged: LangChain and LiteLLM; and what Open WebUI and LibreChat send, as their code of 2026-11 has it."""

import asyncio
import base64
import io
import json
import os

import httpx2 as httpx
import pytest
from PIL import Image
from serving import FEW, data_url, picture, png, serving
from support import CHECKPOINT

SMALL = {"height": 32, "width": 32, "seed": 3, **FEW}


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


@pytest.fixture(scope="module")
def server(model):
    with serving(model, keys=["key"], names=("bagel", "gpt-image-1", "dall-e-3")) as running:
        yield running


@pytest.fixture(scope="module")
def drawn(model):
    """What these options draw, as bytes."""
    return model.generate("a ring", **SMALL).tobytes()


def pixels(data):
    return Image.open(io.BytesIO(data)).tobytes()


def see(text="what?"):
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_url(png())}}]


# ---- as their code sends it


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=f"{server.url}/v1", headers={"Authorization": "Bearer key"}, timeout=60) as client:
        yield client


OPEN_WEBUI = [
    {"model": "bagel", "prompt": "a ring", "n": 1, "size": "32x32", "response_format": "b64_json"},
    {"model": "gpt-image-1", "prompt": "a ring", "n": 1, "size": "32x32"},
    {"model": "dall-e-3", "prompt": "a ring", "n": 1, "size": "32x32", "response_format": "url"},
]
LIBRECHAT = {"model": "gpt-image-1", "prompt": "a ring", "n": 1, "background": "auto", "output_format": "png", "quality": "auto", "size": "auto"}  # fmt: skip
LITELLM = {"model": "bagel", "prompt": "a ring", "n": 1, "size": "32x32", "quality": "hd", "style": "vivid", "response_format": "b64_json", "user": "u"}  # fmt: skip


@pytest.mark.parametrize("body", [*OPEN_WEBUI, LIBRECHAT | {"size": "32x32"}, LIBRECHAT, LITELLM])
def test_pictures_as_they_ask_for_them(web, drawn, body):
    """The model's default size is for those who leave it to the model."""
    [found] = web.post("/images/generations?api-version=2025-04-01", json=body | {"seed": 3, **FEW}).json()["data"]
    data = web.get(found["url"]).content if "url" in found else base64.b64decode(found["b64_json"])
    assert (pixels(data) == drawn) == (body["size"] != "auto")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "gpt-image-1", "prompt": "blue", "quality": "auto", "size": "auto"}, "image[]"),  # LibreChat
        ({"model": "gpt-image-1", "prompt": "blue", "n": "1", "background": "auto"}, "image[]"),  # Open WebUI
        ({"model": "bagel", "prompt": "blue", "n": "1", "response_format": "b64_json"}, "image"),
    ],
)
def test_edits_as_they_ask_for_them(web, model, fields, name):
    files = [(name, ("a.png", png(), "image/png")), (name, ("b.png", png(48), "image/png"))]
    [found] = web.post("/images/edits", data=fields | {"seed": "3", "num_timesteps": "4"}, files=files).json()["data"]
    images = [Image.open(io.BytesIO(data)) for data in (png(), png(48))]
    assert picture(found["b64_json"]).tobytes() == model.run([*images, "blue"], seed=3, **FEW)[0].tobytes()


@pytest.mark.parametrize(
    "body",
    [
        {"stream": True, "stream_options": {"include_usage": True}},  # Open WebUI
        {"stream": False, "max_completion_tokens": 1000},  # its titles
        {"stream": True, "seed": 0, "stop": ["</s>"], "temperature": 0, "top_p": 0.9, "frequency_penalty": 0, "presence_penalty": 0},
        {"stream": True, "user": "5f", "temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0},  # LibreChat
        {"stream": False, "n": 1, "logprobs": False, "parallel_tool_calls": None, "reasoning_effort": None, "store": None},
    ],
)  # fmt: skip
def test_chats_as_they_ask_for_them(web, model, body):
    messages = [{"role": "system", "content": "Look well."}, {"role": "user", "content": see()}]
    answer = web.post("/chat/completions", json={"model": "bagel", "max_tokens": 9, "messages": messages} | body | ({"max_tokens": None} if "max_completion_tokens" in body else {}))  # fmt: skip
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    inputs = ["Look well.", Image.open(io.BytesIO(png())), "what?"]
    assert [text] == model.run(inputs, output="text", max_think_tokens=10)


# ---- LangChain


@pytest.fixture(scope="module")
def langchain(server):
    """Makes its models."""
    made = pytest.importorskip("langchain_openai").ChatOpenAI
    return lambda **options: made(base_url=f"{server.url}/v1", api_key="key", model="bagel", max_retries=0, **options)


def test_langchain_chats(langchain, model):
    chat, want = langchain(max_tokens=9, seed=1), model.chat("hello", max_think_tokens=10)
    answer = chat.invoke([("user", "hello")])
    assert (answer.content, answer.response_metadata["finish_reason"]) == (want, "length")
    assert answer.usage_metadata["output_tokens"] == 9
    assert "".join(chunk.text for chunk in chat.stream("hello")) == want
    assert asyncio.run(chat.ainvoke("hello")).content == want
    seen = model.understand(Image.open(io.BytesIO(png())), "what?", max_think_tokens=10)
    assert chat.invoke([("user", see())]).content == seen
    assert chat.bind(stop=[want[3:5]]).invoke("hello").content == want[:3]
    responses = langchain(max_tokens=9, use_responses_api=True)
    assert responses.invoke("hello").text == want
    assert "".join(chunk.text for chunk in responses.stream("hello")) == want


def test_langchain_keeps_pictures_that_are_parts(langchain, drawn):
    """It drops message.images; what it keeps, it can send back."""
    chat = langchain(seed=3, extra_body={"modalities": ["image"], "picture_parts": True, **SMALL})
    answers = [chat.invoke("a ring")]
    streamed = None
    for chunk in chat.stream("a ring"):
        streamed = chunk if streamed is None else streamed + chunk
    for answer in (*answers, streamed):
        [part] = [part for part in answer.content if part != "" and part.get("type") == "image_url"]
        assert pixels(base64.b64decode(part["image_url"]["url"].partition(",")[2])) == drawn
    edited = langchain(extra_body={"modalities": ["image"], "picture_parts": True, **FEW})
    again = edited.invoke([("user", "a ring"), answers[0], ("user", "blue")])
    assert again.content[0]["image_url"]["url"] != answers[0].content[0]["image_url"]["url"]
    tool = langchain(use_responses_api=True, extra_body={"seed": 3, **FEW})
    answer = tool.bind_tools([{"type": "image_generation", "size": "32x32"}]).invoke("a ring")
    [call] = [part for part in answer.content if part["type"] == "image_generation_call"]
    assert pixels(base64.b64decode(call["result"])) == drawn


def test_langchain_shows_what_is_wrong(langchain):
    import openai

    with pytest.raises(openai.BadRequestError, match="num_inference_steps: BAGEL calls it num_timesteps"):
        langchain(extra_body={"num_inference_steps": 4}).invoke("a ring")


# ---- LiteLLM


@pytest.fixture(scope="module")
def litellm():
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing from the net
    import litellm

    return litellm


def test_litellm(litellm, server, model, drawn):
    here, messages = {"api_base": f"{server.url}/v1", "api_key": "key"}, [{"role": "user", "content": see()}]
    want = model.understand(Image.open(io.BytesIO(png())), "what?", max_think_tokens=10)
    chat = {"model": "openai/bagel", "messages": messages, "max_tokens": 9, "num_retries": 0, **here}
    answer = litellm.completion(**chat, top_p=0.9, stop=["</s>"], user="u", parallel_tool_calls=None)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (want, "length")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)) == want
    body = {"seed": 3, **FEW}
    for form in ("b64_json", "url"):
        options = {"size": "32x32", "extra_body": body | {"response_format": form}}  # which it takes from nobody else
        [found] = litellm.image_generation("a ring", "openai/dall-e-3", **options, **here).data
        data = httpx.get(found.url).content if form == "url" else base64.b64decode(found.b64_json)
        assert pixels(data) == drawn
    files = [io.BytesIO(png()), io.BytesIO(png(48))]
    [found] = litellm.image_edit(files, "blue", "openai/bagel", extra_body=body, **here).data
    images = [Image.open(file) for file in files]
    assert picture(found.b64_json).tobytes() == model.run([*images, "blue"], seed=3, **FEW)[0].tobytes()
    text = (
        litellm.responses(model="openai/bagel", input="hello", max_output_tokens=20, **here).output[0].content[0].text
    )
    assert text == model.chat("hello", max_think_tokens=21)
    with pytest.raises(litellm.BadRequestError, match="logprobs: allowed: False"):
        litellm.completion(**chat, logprobs=True)
