"""`bagel_opt bench`: that it does the work it says, not how fast."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from serving import serving
from support import CHECKPOINT, ROOT

import bagel_opt
from bagel_opt import bench
from bagel_opt.bench import charts, full_size_tables, official, worker
from bagel_opt.bench import serving as bench_serving
from bagel_opt.cli.commands import main
from bagel_opt.model.attention import attention

WORK = bench.Work(height=64, width=96, steps=2, tokens=3, repeats=2)


def test_figures_count_every_step_and_token(eager):
    found = worker.figures(eager, vars(WORK))
    assert {name: len(values) for name, values in found.items()} == {
        "prefill": 2,
        "token": 2 * WORK.tokens,
        "step": 2 * WORK.steps,
        "edit_step": 2 * WORK.steps,
        "request": 2,
    }
    assert all(value > 0 for values in found.values() for value in values)


def test_a_server_is_loaded_and_its_answers_compared(load, monkeypatch, capsys):
    with serving(load(CHECKPOINT, "onnx"), max_queue=32) as server:
        words = ["serving", server.url, "--requests", "10", "--clients", "1", "--num-timesteps", "3"]
        monkeypatch.setattr(sys, "argv", words)
        assert bench_serving.main() == 0
    assert "0 of 10 answers differ" in capsys.readouterr().out


def test_stamps_are_the_times_between_ticks(monkeypatch):
    clock = iter([1.0, 1.5, 3.5])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    assert worker.stamps(lambda tick: (tick(None), tick(None))) == [500, 2000]


@pytest.mark.second
def test_two_processes_of_a_model_are_timed():
    own = {"device": "cpu", "gpus": 2}
    result = bench.time_contender(bench.Contender("two", str(CHECKPOINT), **own), WORK)
    assert "error" not in result, result
    assert len(result["step"]) == 2 * WORK.steps


def test_eager_is_not_timed_as_compiled(eager, monkeypatch):
    job = {
        "device": None,
        "dtype": None,
        "profile": None,
        "backend": "compile",
        "attention": "auto",
        "source": None,
        "gpus": None,
    }
    monkeypatch.setattr(worker.sys, "argv", ["worker", json.dumps(job)])
    monkeypatch.setattr(worker.bagel_opt, "load", lambda *_, **__: eager)
    with pytest.raises(RuntimeError, match=r"nothing compiles here.*bagel-opt doctor"):
        worker.main()


def test_peak_memory_is_the_process_own():
    held = np.ones(100_000_000)  # a child's getrusage would count what this process holds
    program = "from bagel_opt.bench.worker import peak; a = peak(); b = bytes(10) * 30_000_000; print(a, peak())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert before < held.nbytes / 2
    assert 290e6 < after - before < 320e6


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    sizes = ["--height", "64", "--width", "96", "--steps", "2", "--tokens", "3", "--repeats", "1"]
    out = tmp_path / "figures.json"
    assert main(["bench", str(CHECKPOINT), str(bundle), *sizes, "--device", "cpu", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [result["name"] for result in results] == ["0:checkpoint, eager", f"1:{bundle.name}, bundle"]
    for result, folder in zip(results, (CHECKPOINT, bundle), strict=True):
        assert len(result["step"]) == 2
        assert result["size"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert result["peak"] > 50e6
    printed = capsys.readouterr().out
    assert "96x64 pixels" in printed
    assert "1.00" in printed


def test_what_cannot_be_timed_says_why_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "inferencer.py").touch()
    sizes, out = (
        ["--height", "64", "--width", "64", "--steps", "1", "--tokens", "1", "--repeats", "1"],
        tmp_path / "a.json",
    )
    words = [str(CHECKPOINT), *sizes, "--device", "cpu", "--official", str(tmp_path), "--json", str(out)]
    assert main(["bench", *words]) == 1
    results = json.loads(out.read_text())
    assert "No module named" in results[0]["error"]
    assert len(results[1]["step"]) == 1
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) > 100  # not broken at the 80 columns of no terminal
    (line,) = captured.err.splitlines()
    assert line.startswith(f"bagel-opt: could not be timed: {results[0]['name']} (")
    assert "No module named" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "fast"], "backend='fast'; allowed are 'eager', 'compile'"),
        (["/nowhere/at/all"], "/nowhere/at/all is no folder"),
        (["--official", "/nowhere"], "/nowhere is no checkout of the official code: it has no inferencer.py"),
        (["--memory", "12GB"], "--memory is for --preset"),
        (["--preset", "h100", "--memory", "12XB"], "memory='12XB'; allowed are a size such as '12GB'"),
        (["--preset", "h100", "--memory", "3GB"], "profile 'bagel-1024' it takes at least '6.11GB'"),
        (["--preset", "lance", "--aoti", "x"], "--aoti is for --preset h100, not for --preset lance; leave it out"),
        (["--preset", "lance", "--quantization", "fp8"], "--quantization is for --preset h100, not for --preset lance"),
        (["--preset", "lance", "--memory", "12GB"], "--memory is for --preset h100, not for --preset lance"),
        (["--preset", "lance", "--gpus", "2"], "--gpus is for --preset h100, not for --preset lance"),
        (["--preset", "lance", "--official", "/nowhere"], "Lance's official code: it has no modeling/lance/lance.py"),
        (["--preset", "h100", "--steps=4"], "--steps: --preset has its own; leave it out"),
        (["--preset", "lance", "--export", "demo"], "--export: --preset has its own; leave it out"),
        (["--formats", "aoti"], "--formats is for --export, which names the profile of the bundles"),
        (["--gpus", "2", "--export", "demo"], "gpus=2: bundles of format 'onnx' run on one GPU; time those without it"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_exported_bundles_run_as_was_asked(monkeypatch, tmp_path):
    """On as many GPUs, with the same attention; the official code has one."""
    exported, timed = [], []
    monkeypatch.setattr(
        "bagel_opt.export.bundle.export", lambda *_, **how: exported.append(how) or tmp_path / how["format"]
    )
    monkeypatch.setattr(bench, "time_contender", lambda contender, work: timed.append(contender) or {"error": "none"})
    (tmp_path / "inferencer.py").touch()
    how = {"device": "cuda:0", "dtype": "bfloat16", "attention": "sdpa"}
    formats = {"profiles": ["demo"], "official": str(tmp_path)}
    bench.bench([str(CHECKPOINT)], WORK, formats=("export", "compile"), gpus=2, **formats, **how)
    assert [(one.name.split(", ", 1)[1], one.gpus, one.device) for one in timed] == [
        ("official code, one GPU", None, "cuda:0"),
        ("eager", 2, "cuda:0"),
        ("export bundle", 2, "cuda:0"),
        ("compile bundle", 2, "cuda:0"),
    ]
    assert [(one["device"], one["attention"]) for one in exported] == [("cuda", "sdpa")] * 2
    bench.bench([str(CHECKPOINT)], WORK, formats=("onnx",), gpus=1, **formats, **how)
    assert exported[-1] == {"format": "onnx", "dtype": "bfloat16", "device": "cuda"}
    assert timed[-1].gpus == 1


def test_the_default_picture_is_the_models_own(bundle):
    assert bench.default_side(str(CHECKPOINT)) == bench.default_side(str(bundle)) == 128
    assert bagel_opt.load(bundle).config.default_size == 128


@pytest.mark.parametrize("causal", [False, True])
def test_the_official_codes_attention_is_stood_in_for_exactly(causal):
    """Sequences of several lengths, packed, against the attention op on padded rows."""
    lengths = [(3, 9), (1, 4), (7, 7)]
    q, k, v = (torch.randn(sum(pair[side] for pair in lengths), heads, 8) for side, heads in ((0, 6), (1, 2), (1, 2)))
    ends = [torch.tensor([0, *torch.tensor(lengths)[:, side].cumsum(0).tolist()]) for side in (0, 1)]
    got = official.varlen(q, k, v, *ends, 7, 9, causal=causal)
    for (a, b), (c, d) in zip(
        zip(ends[0], ends[0][1:], strict=False), zip(ends[1], ends[1][1:], strict=False), strict=True
    ):
        want = attention(q[None, a:b], k[None, c:d], v[None, c:d], (d - c)[None], causal)[0]
        assert torch.allclose(got[a:b], want, atol=1e-6)


def test_table_compares_with_the_first_row():
    base = {"load": [1.0], "prefill": [5.0], "token": [2.0], "edit_step": [9.0], "request": [1.0]}
    rest = {"peak": 2e9, "size": 3e6, "export": None, "work": vars(WORK)}
    rows = [{"name": name, **base, **rest, "step": [step]} for name, step in (("a", 8.0), ("b", 4.0))]
    cells = bench.table(rows).columns[-1]._cells
    assert cells == ["1.00", "2.00"]
    assert math.isclose(float(cells[1]), 2)


def test_charts_of_full_size_results(tmp_path, monkeypatch):
    results = ROOT / "profiles/results/2026-11-24-h100.json"
    monkeypatch.setattr(sys, "argv", ["charts", str(results), "--out", str(tmp_path / "new")])
    charts.main()
    for name in ("bars.png", "scaling.png"):
        with Image.open(tmp_path / "new" / name) as picture:
            assert len(picture.getcolors(1 << 20)) > 20
    figures, limits = full_size_tables.tables(json.loads(results.read_text()))
    assert [column._cells[1] for column in figures.columns[-2:]] == ["1.99", "1.62"]
    assert limits.columns[-1]._cells[4] == "66%"
