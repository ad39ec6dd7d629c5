"""Odd files through Python, the command line and the server: an answer, or one line that names the field and the reason."""

import io

import httpx2 as httpx
import pytest
from bundles import PROFILES
from odd_pictures import odd_pictures
from PIL import Image
from serving import ask, serving
from support import CHECKPOINT

import bagel_opt
from bagel_opt.cli.commands import main
from bagel_opt.request import Request
from bagel_opt.sampling.planning import make_plan

# Read all over and refused for their numbers or sides; the rest of what is refused is damaged, or no picture.
KNOWN = {
    "I;16 in png": True,
    "I;16 in tiff": True,
    "F in tiff": True,
    "whole numbers 0 to 65535": True,
    "whole numbers -5 to 255": False,
    "whole numbers 0 to 2147483647": False,
    "floats 0 to 1": True,
    "floats 0 to 255": True,
    "floats 0 to 1000": False,
    "floats -1 to 1": False,
    "floats 0 to nan": False,
    "CMYK in jpeg": True,
    "LA in png": True,
    "palette, some transparent": True,
    "orientation 6 in jpeg": True,
    "orientation 77 in png": True,
    "three frames in gif": True,
    "three frames in png": True,
    "1x200 in png": True,
    "1x201 in png": False,
    "png of 30000x30000": False,
    "a text": False,
    "nothing": False,
}


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def pictures(thorough):
    return odd_pictures(300 if thorough else 50)


def python(eager, data):
    """What is wrong, or None. Planned alone: reading is over then."""
    try:
        make_plan(Request([data, "a"], output="text"), eager.config, eager.tokenizer)
    except ValueError as error:
        return str(error)
    return None


def test_what_is_taken(eager):
    found = odd_pictures()
    assert {name: python(eager, found[name]) is None for name in KNOWN} == KNOWN


def test_python_names_the_input_and_the_reason(eager, pictures):
    for name, data in pictures.items():
        error = python(eager, data)
        assert error is None or (error.startswith("inputs[0]: ") and error.isprintable() and len(error) > 20), name
        try:
            opened = Image.open(io.BytesIO(data))  # but not read yet
        except Exception:
            continue
        lazily = python(eager, opened)
        assert lazily is None or lazily.startswith("inputs[0]: "), name


def test_the_command_line_says_it_in_one_line(eager, pictures, tmp_path, monkeypatch, capsys):
    class Planner(bagel_opt.Model):
        def run(self, inputs, **options):
            make_plan(Request(inputs, **options), self.config, self.tokenizer)
            return ["an answer"]

    model = Planner(eager.runtime, eager.config, eager.tokenizer)
    monkeypatch.setattr("bagel_opt.cli.commands.load", lambda *_, **__: model)
    for name, data in pictures.items():
        path = tmp_path / "odd.png"
        path.write_bytes(data)
        status = main(["understand", str(path), "a"])
        out, err = capsys.readouterr()
        if python(eager, data) is None:
            assert (status, out, err) == (0, "an answer\n", ""), name
        else:
            assert (status, out, err.count("\n")) == (1, "", 1), name
            assert err.startswith(("bagel-opt: image: ", "bagel-opt: inputs[0]: ")), name


def test_the_server_answers_or_refuses(eager, pictures):
    model = bagel_opt.Model(eager.runtime, eager.config, eager.tokenizer, [PROFILES[CHECKPOINT]])
    taken = set()
    with serving(model) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for number, (name, data) in enumerate(pictures.items()):
            if number % 2:
                files = {"image": ("odd.png", data, "image/png")}
                form = {"prompt": "a", "size": "input" if number % 4 == 1 else "auto", "num_timesteps": "2"}
                answer = client.post("/v1/images/edits", data=form, files=files)
            else:
                answer = client.post("/v1/chat/completions", json={"messages": ask(data), "max_tokens": 1})
            assert answer.status_code in (200, 400), (name, answer.text)
            if answer.status_code == 200:
                taken.add(name)
                continue
            error = answer.json()["error"]
            assert error["param"].startswith("image" if number % 2 else "messages"), name
            assert error["message"].startswith(error["param"]), name
            assert error["message"].isprintable(), name
    assert taken <= {name for name, data in pictures.items() if python(eager, data) is None}
    assert {name for name in taken if name.endswith((" in png", " in jpeg"))}
