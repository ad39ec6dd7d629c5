"""A model on two GPUs, by NCCL. Run with -s to see the errors."""

import threading
import time

import pytest
import torch
from support import CHECKPOINT, cases

import bagel_opt
from bagel_opt import Request
from bagel_opt.runtime.split_layers import SplitGenerate
from bagel_opt.runtime.split_weights import SplitDecode

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture
def start():
    models = []

    def made(**settings):
        models.append(bagel_opt.load(CHECKPOINT, gpus=2, device="cuda", **settings))
        return models[-1]

    yield made
    for model in models:
        model.close()


@pytest.mark.parametrize("parallel", ["guidance", "sequence", "auto", "tensor"])
@pytest.mark.parametrize(
    ("backend", "dtype", "attention"),
    [("eager", "float32", "sdpa"), ("compile", "float32", "sdpa"), ("eager", "bfloat16", "auto"), ("compile", "bfloat16", "auto")],
)  # fmt: skip
def test_golden_cases(start, parallel, backend, dtype, attention):
    """Three times: launched, captured and replayed."""
    model, errors = start(parallel=parallel, backend=backend, dtype=dtype, attention=attention), {}
    assert model.runtime.rank.runtime.groups.world.inbox  # not everything goes by NCCL
    for case in cases() * 3:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        if dtype == "float32":
            case.check_outputs(outputs, share=1e-2)
        # where rounding changed a random model's thought, the picture is of another thought
        if events and (len(outputs) == 1 or outputs[0] == case.outputs[0]):
            errors[case.name] = max(case.velocity_error(events), errors.get(case.name, 0))
    print(f"\n{parallel} {backend} {dtype}", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < (1e-4 if dtype == "float32" else 0.1)
    if backend == "compile":
        captured = {type(key[0]) for key, graph in model.runtime.inner.graphs.captured.items() if graph}
        assert (SplitGenerate in captured) == (parallel in ("sequence", "auto"))
        assert (SplitDecode in captured) == (parallel in ("tensor", "auto"))


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_texts_of_several_rows(start, backend):
    """As one GPU writes them."""
    one = bagel_opt.load(CHECKPOINT, device="cuda", dtype="float32", backend=backend)
    requests = [Request([text], output="text", max_think_tokens=20) for text in ("why?", "a b", "who")]
    for parallel in ("auto", "tensor"):
        model = start(parallel=parallel, backend=backend, dtype="float32")
        for _ in range(3):
            assert model.run_many(requests) == one.run_many(requests)


def draw(model, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        model.generate("a red circle", num_timesteps=50, seed=1)
        model.run(["why?"], output="text", max_think_tokens=200)


@pytest.mark.parametrize("backend", ["eager", "compile"])
@pytest.mark.parametrize("parallel", ["guidance", "sequence", "tensor"])
def test_a_rank_that_dies_ends_requests(start, parallel, backend):
    """Also where replayed graphs wait for it."""
    model = start(parallel=parallel, backend=backend)
    for _ in range(3):
        model.generate("a red circle", num_timesteps=12, seed=1)
    victim = model.runtime.members.processes[0]
    timer = threading.Timer(0.5, victim.kill)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match="load the model again"):
        draw(model, 60)
    assert time.monotonic() - began < 20
    began = time.monotonic()
    model.close()
    assert time.monotonic() - began < 10
    again = start(parallel=parallel)
    again.generate("a red circle", num_timesteps=4, seed=1)
