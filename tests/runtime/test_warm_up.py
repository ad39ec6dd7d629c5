"""What starts while weights are read, without a GPU: which processes, and that none is left behind."""

import json
import sys
import types

import pytest
import torch

from bagel_opt import installed
from bagel_opt.config import LLMConfig
from bagel_opt.export import compile_cache
from bagel_opt.model import attention
from bagel_opt.runtime import two_streams, warm_up

LLM, CPU = LLMConfig(64, 96, 1, 4, 2, 10), torch.device("cpu")
CONFIG = types.SimpleNamespace(llm=LLM, vit=types.SimpleNamespace(num_attention_heads=16, hidden_size=1152))


class Process:
    def __init__(self, command, **settings):
        self.command, self.settings, self.waited, self.killed = command, settings, 0, False

    def wait(self, timeout=None):
        self.waited += 1

    def kill(self):
        self.killed = True


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The processes that are started on a Hopper GPU with FlashAttention 4, and nothing in its cache yet."""
    found = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "flash_package", lambda: "flash_attn.cute")
    monkeypatch.setattr(warm_up, "kernel_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(warm_up, "_compile_pieces", lambda *_: None)
    monkeypatch.setattr(
        warm_up.subprocess, "Popen", lambda *given, **more: found.append(Process(*given, **more)) or found[-1]
    )
    return found


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (2, 1), (4, 3), (64, warm_up.PARTS)])
def test_every_part_is_compiled_by_one_process(started, monkeypatch, cores, count):
    monkeypatch.setattr(warm_up.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    with warm_up.warming_up(CONFIG, CPU, torch.bfloat16):
        assert len(started) == count
        assert not any(process.waited for process in started)
    assert all(process.waited for process in started)
    for process in started:
        assert process.command[:5] == [sys.executable, "-m", warm_up.__name__, "cpu", "bfloat16"]
        assert json.loads(process.command[5]) == {"layers": [4, 2, 16], "vit": [16, 16, 72]}
    assert sorted(int(part) for process in started for part in process.command[6:]) == list(range(warm_up.PARTS))


@pytest.mark.parametrize(("channels", "has"), [(72, ["layers", "vit"]), (12, ["layers"])])
def test_no_attention_is_compiled_that_a_vit_does_not_take(monkeypatch, channels, has):
    """FlashAttention 4 would raise, and leave the process's other parts undone."""
    ran = []
    monkeypatch.setattr(attention, "flash_package", lambda: "flash_attn.cute")
    monkeypatch.setattr(attention, "attention", lambda q, *_: ran.append(q.shape[3]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    vit = types.SimpleNamespace(num_attention_heads=2, hidden_size=2 * channels)
    heads = warm_up.heads_of(types.SimpleNamespace(llm=LLM, vit=vit))
    for part in range(len(warm_up.ATTENTION)):
        warm_up.compile_part(CPU, torch.float32, heads, part)
    assert sorted(heads) == has
    assert ran == [16] * 6 + [72] * ("vit" in has)


def test_nothing_starts_where_all_is_there(started, tmp_path):
    for name in installed.KERNELS:
        (tmp_path / name / "version").mkdir(parents=True)
        (tmp_path / name / "version" / "kernel.o").touch()
    with warm_up.warming_up(CONFIG, CPU, torch.bfloat16):
        assert not started


def test_what_an_aoti_bundle_has_compiled(monkeypatch, tmp_path):
    """Attention of its layers; in its programs the ViT's is SDPA."""
    ran, model = [], types.SimpleNamespace(config=CONFIG, device=CPU, dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "flash_package", lambda: "flash_attn.cute")
    monkeypatch.setattr(attention, "attention", lambda q, *_: ran.append(q.shape[3]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(compile_cache, "_kernel_folders", lambda _: {"flash_attention": tmp_path / "kernels"})
    compile_cache.keep_attention_kernels(model, tmp_path / "bundle")
    assert ran == [16] * 6


def test_no_process_outlives_a_load_that_fails(started):
    with pytest.raises(OSError, match="the disk"), warm_up.warming_up(CONFIG, CPU, torch.bfloat16):
        raise OSError("the disk")
    assert started
    assert all(process.killed for process in started)


def test_what_cannot_be_started_does_not_end_a_load(started, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(warm_up.subprocess, "Popen", refuse)
    with warm_up.warming_up(CONFIG, CPU, torch.bfloat16):
        pass


@pytest.mark.parametrize("kinds", [{}, {"und": "int8"}, {"und": "int4", "gen": "fp8"}], ids=str)
def test_every_piece_is_run_as_it_will_be(monkeypatch, kinds):
    """For text and flow steps, and for tokens of one row and of several."""
    seen = []
    plain = types.SimpleNamespace(linear=torch.nn.functional.linear)
    monkeypatch.setitem(sys.modules, "bagel_opt.runtime.one_token", plain)
    monkeypatch.setattr("bagel_opt.runtime.one_token", plain, raising=False)

    def compiled(piece):
        def run(*given):
            seen.append((piece.__name__, tuple(given[1].shape[:2])))
            return piece(*given)

        return run

    monkeypatch.setattr(two_streams, "compiled", compiled)
    warm_up._run_all_pieces(LLM, CPU, torch.float32, kinds)
    many = {(name, (1, 64)) for name in ("enter", "leave", "norm", "to_heads")}
    assert set(seen) == many | {(name, rows) for name in ("enter", "leave") for rows in ((1, 1), (2, 1))}
    assert seen.count(("enter", (1, 64))) == (2 if len(kinds) else 1)
