"""What torch.compile is asked to compile, without compiling it: how often, as sizes change."""

import pytest
import torch
from PIL import Image
from support import ODD

import bagel_opt
from bagel_opt import Request


@pytest.fixture
def compiled(monkeypatch):
    """A compiled model, and the graphs that torch has been asked for."""
    made, compiler = [], torch.compile

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda part, **how: compiler(part, backend=counting, **how))
    monkeypatch.setattr("bagel_opt.loading.compiles", lambda device: True)
    torch._dynamo.reset()
    yield bagel_opt.load(ODD / "checkpoint", device="cpu", backend="compile"), made
    torch._dynamo.reset()


@pytest.mark.second
def test_a_layer_is_compiled_once_for_each_program(compiled):
    """And for one row and for several; never for another size, nor for what lies otherwise in memory."""
    model, made = compiled
    side, few = model.config.token_pixels, {"num_timesteps": 6, "seed": 1}

    def draw(height, width, prompt="a red circle"):
        return Request([prompt], height=height * side, width=width * side, **few)

    model.run_many([draw(4, 4)])
    assert len(made) == 2  # text, and a flow step of two rows
    for sizes in ((4, 5), (9, 9), (12, 10)):
        model.run_many([draw(*sizes)])
    model.run_many([draw(4, 4, "a very long tale " * 30)])
    model.run_many([draw(3, 3), draw(10, 9)])
    assert len(made) <= 3  # a step of one row, where that takes less than one of all
    before = len(made)
    for size in ((40, 40), (90, 60)):
        model.edit(Image.new("RGB", size), "make it green", **few)
    assert len(made) - before <= 3  # the ViT, its context, and clean latents in one row
    before = len(made)
    for prompt in ("what is it?", "what is it? " * 20):
        model.run_many([Request([prompt], output="text", max_think_tokens=4)])
    assert len(made) == before + 1  # a token
    requests = [Request(["what?"], output="text", max_think_tokens=4) for _ in range(3)]
    model.run_many(requests)
    model.run_many(requests[:2])
    assert len(made) == before + 2  # tokens of several rows
