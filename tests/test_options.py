"""Options are written down once, in bagel_opt/options.py: the command line, the bodies and the page follow it."""

import argparse
import dataclasses
import functools
import json
import math
import re
import types
from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

import bagel_opt
from bagel_opt.cli.arguments import parser
from bagel_opt.cli.commands import COMMANDS
from bagel_opt.option_kinds import Choice, Flag, Interval, Number, Scales, Texts
from bagel_opt.options import ADAPTERS, EVERY, INPUTS, INTERLEAVING, PICTURE, READING, SIZE, VIDEO, described
from bagel_opt.request import Options, Request
from bagel_opt.serve import Limits, Metrics, Service, create_app
from bagel_opt.serve.chat_bodies import ChatBody
from bagel_opt.serve.fields import TEXT_LIMIT, WHOLE_LIMIT
from bagel_opt.serve.image_bodies import EditBody, ImageBody
from bagel_opt.serve.video_bodies import VideoBody

OF_CHAT, OF_VIDEO = described(INTERLEAVING), described(VIDEO)
ALL = described(EVERY, PICTURE, SIZE, INPUTS, READING, VIDEO, ADAPTERS) | OF_CHAT
PYTHON_ALONE = {"output", "noise", "vae_noise", "on_step", "on_token", "on_output"}


def flags(command):
    """What each option of a command is called, by its name in Python."""
    commands = next(a for a in parser(COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions if action.option_strings}


def client(limits, without=OF_VIDEO, **recommended):
    model = types.SimpleNamespace(defaults=Options(**recommended), config=types.SimpleNamespace(without=without))
    service = Service(("test",), types.SimpleNamespace(metrics=Metrics(), timeout=60, model=model), limits)
    return TestClient(create_app(service))


def told(limits=Limits(), **recommended):  # noqa: B008
    return client(limits, **recommended).get("/options.json").json()


def pieces(option):
    """(values that are allowed, values that are not), as JSON has them."""
    match option.kind:
        case Number(low, high, whole):
            step = 1 if whole else 1e-6
            good, bad = [low, low + step], [low - step, "many"]
            if high is not None:
                good, bad = [*good, high], [*bad, high + step]
            return good, [*bad, low + 0.5] if whole else [*bad, math.nan]
        case Interval(low, high):
            return [[low, high], [low, low]], [[low - 1e-6, high], [low, high + 1e-6], [low], "ab"]
        case Choice(values):
            return list(values), ["", "other", 1]
        case Flag():
            return [True, False], [2, "maybe"]
        case Texts(most, longest):
            return ["a" * longest, [], ["a", "b"], ["a"] * most], [
                "",
                "a" * (longest + 1),
                [""],
                ["a"] * (most + 1),
                [1],
            ]
        case Scales(low, high):
            return [{}, {"a": low, "b": high}], [{"a": high + 1}, {"a": "much"}, ["a"], "a", 1]
    return ["", "some text"], [1]


def test_all_fields_are_described():
    assert list(described()) == [field.name for field in dataclasses.fields(Options)]
    assert set(described()) - set(ALL) == PYTHON_ALONE
    assert all(option.help and (option.default is not None or option.unset) for option in ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_ranges_are_the_same_everywhere(name):
    option = ALL[name]
    good, bad = pieces(option)
    beside = {"height": "width", "width": "height"}.get(name)  # a body wants both or neither
    chat = functools.partial(ChatBody, messages=[{"role": "user", "content": "a"}], output="interleaved")
    bodies = [chat] if name in OF_CHAT else [functools.partial(body, prompt="a") for body in (ImageBody, EditBody)]
    for body in bodies if name not in OF_VIDEO else ():
        for value in good:
            both = {name: value} | ({beside: 16} if beside else {})
            assert getattr(body(**both), name) in (value, tuple(value) if isinstance(value, list) else 0)
        for value in bad:
            with pytest.raises(ValidationError):
                body(**{name: value}, **({beside: 16} if beside else {}))
    for value in good:
        Request("a", **{name: value})
    for value in bad:
        with pytest.raises(ValueError, match=name):
            Request("a", **{name: value})


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("generate", (EVERY, PICTURE, SIZE, INPUTS, VIDEO)),
        ("edit", (EVERY, PICTURE, SIZE, INPUTS, READING, VIDEO)),
        ("understand", (EVERY, READING, VIDEO)),
        ("chat", (EVERY,)),
        ("interleave", (EVERY, PICTURE, SIZE, INPUTS, READING, INTERLEAVING)),
    ],
)
def test_the_command_line_has_them(command, groups):
    found = flags(command)
    assert set(found) & set(described()) == set(described(*groups))
    for name, option in described(*groups).items():
        assert found[name].help.startswith(option.help)
        assert f"--{name}" in found[name].option_strings
        assert found[name].default == argparse.SUPPRESS  # what was not given is left to Options
    shown = {name: found[name].help for name in described(*groups)}
    assert shown["text_temperature"].endswith("(0.3)")
    if "cfg_interval" in shown:
        assert shown["cfg_interval"].endswith("(0.4 1)")
        assert found["cfg_renorm_type"].metavar == "global|channel|text_channel"


def test_the_bodies_have_them():
    for body, wanted in (
        (ImageBody, set(ALL) - set(OF_CHAT) - set(OF_VIDEO)),
        (EditBody, set(ALL) - set(OF_CHAT) - set(OF_VIDEO)),
        (ChatBody, set(ALL) - set(OF_VIDEO)),
        (VideoBody, set(ALL) - set(OF_CHAT)),
    ):
        assert set(described()) & set(body.model_fields) - {"output"} == wanted
        properties = body.model_json_schema()["properties"]
        assert properties["cfg_text_scale"]["description"].endswith("; up to 1 is off. Default: 4.0.")
        assert {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63} in properties["seed"]["anyOf"]
        assert {"type": "string", "maxLength": TEXT_LIMIT} in properties["negative_prompt"]["anyOf"]


def test_the_page_is_told_them():
    entries = {entry["name"]: entry for entry in told()}
    assert set(entries) == set(described(EVERY, PICTURE, INPUTS, READING, INTERLEAVING)) - {"seed", "think"}
    for name, entry in entries.items():
        default = ALL[name].default
        assert entry["default"] == entry["value"] == (list(default) if isinstance(default, tuple) else default)
        assert entry["help"].lower() == f"{ALL[name].help}.".lower()
        assert entry["modes"][-1] == "interleave"
        assert ("ask" in entry["modes"]) == (name in described(EVERY, READING))
        assert ("edit" in entry["modes"]) == (name not in OF_CHAT)
    assert (entries["timestep_shift"]["min"], entries["timestep_shift"]["max"]) == (0.001, 1000)
    assert (entries["num_timesteps"]["max"], entries["max_think_tokens"]["max"]) == (200, WHOLE_LIMIT)
    assert entries["cfg_img_scale"]["modes"] == ["edit", "interleave"]
    assert (entries["max_rounds"]["max"], entries["max_rounds"]["modes"]) == (Limits().pictures, ["interleave"])


def test_the_page_is_told_what_the_model_has():
    entries = {entry["name"]: entry for entry in client(Limits(), {"num_frames", *OF_CHAT}).get("/options.json").json()}
    assert set(entries) == set(described(EVERY, PICTURE, INPUTS, READING, VIDEO)) - {"seed", "think", "num_frames"}
    assert [entries[name]["modes"] for name in ("fps", "cfg_text_scale", "top_p")] == [
        ["video"],
        ["draw", "edit", "video", "interleave"],
        ["draw", "edit", "video", "ask", "interleave"],
    ]


def test_the_page_begins_with_what_the_model_recommends():
    entries = {entry["name"]: entry for entry in told(cfg_renorm_min=1.0, stop=["a", "b"], num_timesteps=300)}
    assert entries["cfg_renorm_min"]["default"] == entries["cfg_renorm_min"]["value"] == 1.0
    assert entries["stop"]["default"] == entries["stop"]["value"] == "a"
    assert (entries["num_timesteps"]["default"], entries["num_timesteps"]["value"]) == (300, 200)


@pytest.mark.parametrize(("most", "value"), [(60, 50), (20, 20)])
def test_the_page_knows_the_servers_own_limit(most, value):
    [entry] = [entry for entry in told(Limits(timesteps=most)) if entry["name"] == "num_timesteps"]
    assert (entry["max"], entry["value"], entry["default"]) == (most, value, 50)


def test_options_json_is_for_the_page_alone():
    web = client(Limits())
    answer = web.get("/options.json")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "options.json" not in json.dumps(web.get("/openapi.json").json())


def test_nothing_of_them_is_written_again():
    """No name, choice or bound of an option but in options.py; "think" and "seed" are fields of the page's own."""
    home = Path(bagel_opt.__file__).parent
    script = (home / "serve" / "page" / "options.js").read_text(encoding="utf-8")
    choices = [value for option in ALL.values() if isinstance(option.kind, Choice) for value in option.kind.values]
    names = {*ALL, *choices} - {"input"}  # which is an element of HTML too
    assert [word for word in names if re.search(rf"\b{word}\b", script)] == []
    assert set(re.findall(r"[0-9]+", script)) <= {"0", "1"}  # indices
    for file in (
        "serve/fields.py",
        "serve/chat_bodies.py",
        "serve/image_bodies.py",
        "serve/video_bodies.py",
        "cli/arguments.py",
    ):
        text = (home / file).read_text(encoding="utf-8")
        written = {
            name for name in (*described(PICTURE, INPUTS), *choices) if f'"{name}"' in text or f"{name}:" in text
        }
        assert written == set(), file
