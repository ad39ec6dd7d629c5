"""`bagel-opt doctor`."""

import json
import logging
import subprocess
import sys

import pytest
from support import ROOT

import bagel_opt
from bagel_opt.cli.commands import main

FOUND = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
    "devices": [
        {"device": "cpu", "model": "Some CPU", "cores": 2, "features": "AVX2", "uses": {"attention, float32": "sdpa"}},
        {
            "device": "cuda:0",
            "model": "Some GPU",
            "capability": "9.0",
            "memory_bytes": 85 * 10**9,
            "uses": {"fused products": "none"},
        },
    ],
    "unused": [
        {"what": "torch.compile", "why": "Triton [red]is\x1b[31m not installed", "do": "pip install triton"},
        {"what": "an older GPU", "why": "has less", "do": ""},
    ],
}


@pytest.fixture
def found(monkeypatch):
    def warns():
        logging.getLogger("bagel_opt").warning("what is among the facts, too")
        return FOUND

    monkeypatch.setattr("bagel_opt.cli.doctor.facts", warns)


def test_tables(found, capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert ["bagel_opt", bagel_opt.__version__] in rows
    assert ["triton", "not installed"] in rows
    assert ["what it is", "Some CPU, 2 cores, AVX2"] in rows
    assert ["what it is", "Some GPU, compute capability 9.0, 85.0 GB"] in rows
    assert ["fused products", "none"] in rows
    assert out.splitlines()[-4:] == [
        "not used",
        "- torch.compile: Triton [red]is\\x1b[31m not installed",
        "      pip install triton",
        "- an older GPU: has less",
    ]


def test_commands_can_be_copied_from_a_narrow_terminal(found, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    main(["doctor"])
    assert "- torch.compile: Triton [red]is\\x1b[31m not installed\n" in capsys.readouterr().out


def test_json(found, capsys):
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("versions") == {"bagel_opt": bagel_opt.__version__, **FOUND["versions"]}
    assert told == {name: FOUND[name] for name in ("devices", "unused")}


def test_where_neither_torch_nor_onnxruntime_is():
    """In a process that has imported neither before, and that has no log."""
    script = """
import logging, sys
sys.modules.update(torch=None, onnxruntime=None)
from bagel_opt.cli import commands, doctor
facts = doctor.facts
doctor.facts = lambda: logging.getLogger("bagel_opt").warning("what is among the facts, too") or facts()
raise SystemExit(commands.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    for line in ("torch is not installed", "pip install 'bagel-opt[torch]'", "pip install 'bagel-opt[onnx]'"):
        assert line in done.stdout
