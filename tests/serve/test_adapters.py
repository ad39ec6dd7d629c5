"""Adapters that a server keeps apart: each request's own."""

import json

import numpy as np
import openai
import pytest
from adapters import BOTH, adapted
from serving import FEW, ask, picture, png, serving
from support import CHECKPOINT

import bagel_opt
from bagel_opt.cli.arguments import parser
from bagel_opt.cli.commands import COMMANDS
from bagel_opt.cli.model_arguments import load_settings
from bagel_opt.cli.serving import server_settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    adapted(targets=BOTH).save_pretrained(place := tmp_path_factory.mktemp("adapter"))
    return place


@pytest.fixture(scope="module")
def settings(place):
    """As the command line has them."""
    arguments = ["serve", str(CHECKPOINT), "--profile", "demo", "--device", "cpu", "--adapter", f"style={place}"]
    return parser(COMMANDS).parse_args(arguments)


@pytest.fixture(scope="module")
def model(settings):
    return bagel_opt.load(settings.checkpoint, profile=settings.profile, **load_settings(settings))


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()


def drawn(client, **fields):
    body = {"seed": 3, "height": 64, "width": 64, **FEW, **fields}
    return picture(client.images.generate(prompt="a red circle", extra_body=body).data[0].b64_json)


def test_a_request_asks_for_them(client, place):
    plain, merged = (bagel_opt.load(CHECKPOINT, device="cpu", lora=lora) for lora in ((), [(place, 0.5)]))
    without, with_it = (
        np.asarray(m.generate("a red circle", seed=3, height=64, width=64, **FEW), int) for m in (plain, merged)
    )
    assert np.abs(without - with_it).mean() > 2
    assert np.abs(drawn(client) - without).max() <= 1
    for name in ("adapters", "lora"):
        assert np.abs(drawn(client, **{name: {"style": 0.5}}) - with_it).max() <= 1


def test_in_a_form(client):
    edits = [
        client.images.edit(image=png(), prompt="blue", extra_body={"seed": 1, **FEW} | given)
        for given in ({}, {"adapters": json.dumps({"style": 1})}, {"lora": json.dumps({"style": 1})})
    ]
    first, second, third = (np.asarray(picture(answer.data[0].b64_json), int) for answer in edits)
    assert np.abs(first - second).mean() > 2
    assert np.array_equal(second, third)


def test_in_a_chat(client, model):
    texts = [
        client.chat.completions.create(model="test", messages=ask(png()), max_tokens=8, extra_body=given)
        for given in ({}, {"lora": {"style": 100.0}})
    ]
    assert len({answer.choices[0].message.content for answer in texts}) == 2


def test_models_says_which(client):
    [card] = client.models.list().data
    assert card.adapters == ["style"]


@pytest.mark.parametrize(
    "given", [{"nothing": 1}, {"style": 101}, {"style": "much"}, ["style"], "style", {"style": None}]
)
def test_what_is_refused(client, given):
    with pytest.raises(openai.BadRequestError) as error:
        drawn(client, adapters=given)
    assert "adapters" in str(error.value)


@pytest.mark.parametrize("field", ["adapters", "lora"])
def test_the_name_that_was_given_is_told(client, field):
    given = {field: {"nothing": 1}}
    calls = (
        lambda: drawn(client, **given),
        lambda: client.chat.completions.create(model="test", messages=ask(png()), extra_body=given),
        lambda: client.responses.create(model="test", input="a", extra_body=given),
    )
    for call in calls:
        with pytest.raises(
            openai.BadRequestError, match=f"{field}: there is no 'nothing'; there are 'style'"
        ) as refused:
            call()
        assert refused.value.param == field


def test_both_names(client):
    with pytest.raises(openai.BadRequestError, match="lora: given beside adapters; give one of them"):
        drawn(client, adapters={"style": 1}, lora={"style": 1})


def test_names_on_the_command_line(settings, capsys):
    settings.adapters = settings.adapters * 2
    with pytest.raises(ValueError, match="'style' twice"):
        server_settings(settings)
    for bad in ("style", "=place", "style="):
        with pytest.raises(SystemExit):
            parser(COMMANDS).parse_args(["serve", "--adapter", bad])
        assert "is no NAME=FILE" in capsys.readouterr().err
