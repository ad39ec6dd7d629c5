"""/v1/responses with the openai client, unchanged: texts, pictures, the tool image_generation, streams, what goes back."""

import io
import json

import openai
import pytest
from PIL import Image
from serving import FEW, data_url, picture, png
from support import CHECKPOINT

SIZE = "32x32"
TOOL = {"type": "image_generation", "size": SIZE}
BODY = {"seed": 3, **FEW}


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


def see(*parts):
    return [{"role": "user", "content": list(parts)}]


LOOK = see(
    {"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": data_url(png()), "detail": "auto"}
)


def test_texts(client, model):
    answer = client.responses.create(model="test", input="hello", max_output_tokens=7)
    assert answer.output_text == model.chat("hello", max_think_tokens=8)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.output_tokens, answer.usage.total_tokens - answer.usage.input_tokens) == (7, 7)
    answer = client.responses.create(
        model="test", input="hello", instructions="Look well.", temperature=1.5, top_p=0.9, max_output_tokens=7,
        extra_body={"seed": 4}, store=False, truncation="auto", reasoning={"effort": "low"}, tool_choice="none",
        text={"format": {"type": "text"}, "verbosity": "low"}, parallel_tool_calls=True, metadata={"a": "b"},
    )  # fmt: skip
    options = {"do_sample": True, "text_temperature": 1.5, "top_p": 0.9, "seed": 4, "max_think_tokens": 8}
    assert [answer.output_text] == model.run(["Look well.", "hello"], output="text", **options)
    assert answer.metadata == {"a": "b"}


def test_a_picture_goes_in(client, model):
    answer = client.responses.create(model="test", input=LOOK, max_output_tokens=7)
    assert answer.output_text == model.understand(Image.open(io.BytesIO(png())), "what?", max_think_tokens=8)


def test_a_text_in_a_stream(client):
    options = {"model": "test", "input": LOOK, "max_output_tokens": 9}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:  # which checks the order of the events
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events if "delta" in event.type) == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert (final.output_text, final.usage) == (whole.output_text, whole.usage)
    with client.responses.stream(**{**options, "max_output_tokens": 400}, extra_body={"stop": whole.output_text[2:4]}) as stream:  # fmt: skip
        assert stream.get_final_response().output_text == whole.output_text[:2]


def drawn(answer):
    [item] = [item for item in answer.output if item.type == "image_generation_call"]
    return item


def test_a_picture_comes_out(client, model):
    answer = client.responses.create(model="test", input="a ring", tools=[TOOL], extra_body=BODY)
    direct = client.images.generate(prompt="a ring", size=SIZE, extra_body=BODY)
    assert drawn(answer).result == direct.data[0].b64_json
    assert (answer.status, drawn(answer).status, drawn(answer).size) == ("completed", "completed", SIZE)
    options = {**BODY, "think": True, "max_think_tokens": 6}
    thought = client.responses.create(model="test", input="a ring", tools=[TOOL], extra_body=options)
    want = client.images.generate(prompt="a ring", size=SIZE, extra_body=options).data[0]
    assert [item.type for item in thought.output] == ["reasoning", "image_generation_call"]
    assert (thought.output[0].content[0].text, drawn(thought).result) == (want.thought, want.b64_json)
    assert thought.usage.output_tokens_details.reasoning_tokens == 5
    # both go back as they came, beside what is to change
    history = [{"role": "user", "content": "a ring"}, *(item.model_dump() for item in thought.output)]
    edited = client.responses.create(
        model="test", input=[*history, *see({"type": "input_text", "text": "blue"})], tools=[{"type": "image_generation"}],
        tool_choice={"type": "image_generation"}, extra_body=BODY,
    )  # fmt: skip
    want = model.run(["a ring", picture(drawn(thought).result), "blue"], **BODY)[0]
    assert list(picture(drawn(edited).result).getdata()) == list(want.getdata())


@pytest.mark.parametrize("think", [False, True])
def test_a_picture_in_a_stream(client, think):
    options = {"model": "test", "input": "a ring", "extra_body": {**BODY, "think": think, "max_think_tokens": 6}}
    tool = {**TOOL, "output_format": "webp"}
    whole = client.responses.create(**options, tools=[tool])
    with client.responses.stream(**options, tools=[tool | {"partial_images": 2}]) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.").removeprefix("image_generation_call.") for event in events]
    last = ["output_item.added", "in_progress", "generating", "partial_image", "partial_image", "completed", "output_item.done", "completed"]  # fmt: skip
    assert kinds[-8:] == last
    assert [event.partial_image_index for event in events if "partial" in event.type] == [0, 1]
    assert drawn(events[-1].response).result == events[-2].item.result == drawn(whole).result
    assert picture(drawn(whole).result).format == "WEBP"
    if think:
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "reasoning_text.delta"]
        assert kinds[-10:-8] == ["reasoning_text.done", "output_item.done"]
        assert events[-1].response.output[0].content[0].text == whole.output[0].content[0].text
        assert events[-2].output_index == 1


def test_a_picture_larger_than_a_text_may_be(server, client):
    """The base64 of earlier answers does not count as text."""
    large = data_url(png() + bytes(600_000)).partition(",")[2]
    options = {"model": "test", "max_output_tokens": 5}
    found = set()
    for result in (large, data_url(png()).partition(",")[2]):
        items = [{"type": "image_generation_call", "id": "a", "status": "completed", "result": result}]
        found.add(client.responses.create(input=[*items, {"role": "user", "content": "what?"}], **options).output_text)
    assert len(found) == 1
    assert server.service.bodies.left == server.service.limits.bodies_bytes


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"input": []}, "input", "List should have at least 1 item"),
        ({"input": see({"type": "input_text", "text": 3})}, "input.0.content.0.text", "must be a string"),
        ({"input": see({"type": "input_file"})}, "input.0.content.0.type", "allowed: 'input_text', 'output_text', 'input_image'"),
        ({"input": see({"type": "input_image", "file_id": "f"})}, "input.0.content.0.image_url", "missing"),
        ({"input": see({"type": "input_image", "image_url": "http://a/b.png"})}, "input.0.content.0.image_url", "addresses are not fetched here"),
        ({"input": [{"type": "function_call"}]}, "input.0.type", "allowed: 'message', 'image_generation_call', 'reasoning'"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept; send all that was said as input"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "allowed: 'image_generation'"),
        ({"tools": [{**TOOL, "background": "transparent"}]}, "tools.0.background", "allowed: 'auto' or 'opaque'"),
        ({"tools": [{**TOOL, "input_image_mask": {}}]}, "tools.0.input_image_mask", "BAGEL cannot fill in a part"),
        ({"tools": [{**TOOL, "size": "33x32"}]}, "tools.0.size", "width=33"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"include": ["message.output_text.logprobs"]}, "include.0", "allowed: 'reasoning.encrypted_content'"),
        ({"extra_body": {"num_timesteps": 4}}, "num_timesteps", "only with the tool image_generation"),
        ({"extra_body": {"max_think_tokens": 4}, "max_output_tokens": 4}, "max_output_tokens", "given beside"),
    ],
)  # fmt: skip
def test_what_is_refused(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": "test", "input": "a", **options})
    assert refused.value.param == param
    assert refused.value.body["message"].startswith(f"{param}: {message}")


def test_a_failure_on_the_way(server, client):
    server.runtime.failing["step"] = RuntimeError("device lost")
    try:
        with pytest.raises(openai.APIError, match="the server failed"):
            list(client.responses.create(model="test", input="a", tools=[TOOL], stream=True, extra_body=BODY))
    finally:
        server.runtime.failing.clear()
    assert server.rows_in_use() == 0


def test_the_document_has_it(client):
    document = client.get("../openapi.json", cast_to=object)
    content = document["paths"]["/v1/responses"]["post"]["requestBody"]["content"]
    assert "image_generation" in json.dumps(document["components"]["schemas"])
    assert content["application/json"]["schema"]["$ref"].endswith("/ResponsesBody")
