"""What runs before a server says that it is ready."""

import logging

import pytest
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.cli.arguments import parser
from bagel_opt.cli.commands import COMMANDS
from bagel_opt.serve import make_app
from bagel_opt.serve.warm import warm_up


@pytest.fixture(scope="module")
def model(load):
    return load(CHECKPOINT, "onnx")


def test_each_size_is_drawn_edited_and_asked_about(model, monkeypatch, caplog):
    seen, run = [], type(model).run_many
    monkeypatch.setattr(type(model), "run_many", lambda self, r, *a: seen.append(list(r)) or run(self, seen[-1], *a))
    with caplog.at_level(logging.INFO, "bagel_opt.serve"):
        app = make_app(model, ["test"], warm=[(64, 48), (32, 32)])
    logging.captureWarnings(False)  # as before
    app.state.service.close()
    assert [(r.options.output, len(r.inputs)) for (r,) in seen] == 2 * [("image", 1), ("image", 2), ("text", 2)]
    assert [(r.options.width, r.options.height) for (r,) in seen[::3]] == [(64, 48), (32, 32)]
    assert [r.inputs[0].size for (r,) in seen[1::3]] == [(64, 48), (32, 32)]
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("warm for ")]
    assert [line.partition(",")[0] for line in told] == ["warm for 64x48", "warm for 32x32"]


def test_a_size_without_room_ends_the_start(model):
    with pytest.raises(ValueError, match=r"^warm 4096x4096: height, width: 4096x4096 pixels"):
        warm_up(model, [(4096, 4096)])


def test_requests_that_the_profile_is_not_for_are_left_out(caplog):
    model = bagel_opt.load(CHECKPOINT, device="cpu", profile=Profile("small", 3, 768, 64, 1, 64))
    with caplog.at_level(logging.INFO, "bagel_opt.serve"):
        warm_up(model, [(32, 32)])
    assert caplog.text.count("not warmed with pictures of 32x32 as input: the request needs patches") == 2
    assert "warm for 32x32" in caplog.text


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "64x64,", "0x64", "64x-1", "64x64x64", "a x b", "٣x٣"])
def test_sizes_are_checked_before_anything_is_loaded(text, capsys):
    with pytest.raises(SystemExit):
        parser(COMMANDS).parse_args(["serve", "--warm", text])
    assert "are no sizes as 1024x1024,768x1024" in capsys.readouterr().err


def test_sizes_of_the_command_line():
    assert parser(COMMANDS).parse_args(["serve", "--warm", "1024x768,64x64"]).warm == ((1024, 768), (64, 64))
    assert parser(COMMANDS).parse_args(["serve"]).warm == ()
