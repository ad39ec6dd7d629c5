"""When programs are captured as CUDA graphs, and which graphs are kept; without a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import CHECKPOINT

from bagel_opt.runtime import cuda_graphs
from bagel_opt.runtime.torch import SHORT


class Captured:
    """In place of a graph."""

    def __init__(self, call, inputs, caches, pool):
        self.call, self.caches = call, caches

    def __call__(self, inputs):
        return ("replayed", *self.call(*inputs, *self.caches)[: 1 - len(self.caches) or None])


@pytest.fixture
def graphs(monkeypatch):
    pools = iter(range(100))
    monkeypatch.setattr(cuda_graphs, "Graph", Captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    return cuda_graphs.Graphs(torch.device("cpu"))


def program(*tensors):
    return ("ran", *tensors[-2:])


def count(graphs):
    return sum(graph is not None for graph in graphs.captured.values())


def test_shapes_are_captured_as_they_come_again(graphs):
    caches = [torch.zeros(2, 8), torch.zeros(2, 8)]
    for size in (3, 4):
        assert graphs.run(program, [np.ones(size)], caches) == ("ran",)  # the caches are left out
    assert count(graphs) == 0
    assert graphs.run(program, [np.ones(3)], caches)[0] == "replayed"
    assert count(graphs) == 1
    assert graphs.run(program, [torch.ones(3)], caches)[0] == "replayed"
    other = [torch.zeros(2, 8), torch.zeros(2, 8)]
    assert graphs.run(program, [np.ones(3)], other) == ("ran",)  # at another place


def test_graphs_for_caches_that_go_are_dropped(graphs):
    memory = torch.zeros(4, 8)
    caches = [*memory.view(2, 2, 8).unbind()]
    for _ in range(2):
        graphs.run(program, [np.ones(3)], caches)
    assert count(graphs) == 1
    graphs.forget(memory)
    assert not graphs.captured
    assert graphs.run(program, [np.ones(3)], caches) == ("ran",)


def test_the_graphs_that_were_used_last_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST", 3)

    def run(size):
        return graphs.run(program, [np.ones(size)], [torch.zeros(1), torch.zeros(1)][:0])[0]

    for size in (1, 2, 3):
        run(size)
        run(size)
    assert run(1) == "replayed"
    assert run(4) == "ran"  # and 2 is gone
    assert [run(size) for size in (1, 3, 2)] == ["replayed", "replayed", "ran"]
    assert len(graphs.captured) == 3


def test_programs_that_are_captured(load):
    """Those that come again with the same shapes, for which launching takes longer than computing; none whose weights come and go."""
    runtime = load(CHECKPOINT, "eager").runtime

    texts = {"text": (1, 64), "as long as may be": (1, SHORT), "long": (1, SHORT + 64), "two": (2, 64)}

    def captured(**plan):
        runtime.plan = SimpleNamespace(**plan) if plan else None
        found = {name for name, shape in texts.items() if runtime._replays("text", [np.zeros(shape, np.int64)])}
        others = "vit", "vit_context", "decode", "generate", "step", "vae_decode"
        return found | {name for name in others if runtime._replays(name, [np.zeros((1, 64))])}

    try:
        short = {"text", "as long as may be"}
        every = {*short, "vit", "decode", "generate", "step"}
        assert captured() == every
        assert captured(streams_in=lambda program: program == "generate", away={"vit"}) == every - {"vit", "generate"}
        streams = "text", "decode"
        assert captured(streams_in=lambda program: program in streams, away=set()) == every - {*short, "decode"}
    finally:
        runtime.plan = None
