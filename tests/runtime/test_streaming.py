"""Weights that come from the host's memory, to the CPU as to a card: what is computed with them is the same, bit for bit."""

import contextlib
import dataclasses
import gc
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bagel_opt
from bagel_opt import Request
from bagel_opt.errors import ProfileError
from bagel_opt.loading import shipped_model
from bagel_opt.model.transformer import Layer
from bagel_opt.profile import load_profile
from bagel_opt.runtime import streaming
from bagel_opt.runtime.memory_plan import MemoryPlan, make_plan, needed_room
from bagel_opt.runtime.torch import GRAPHED

CPU = torch.device("cpu")
FEW = {"height": 32, "width": 32, "num_timesteps": 4, "cfg_interval": (0.0, 1.0)}
# Layers that stream at these sizes, of six; the least that each takes is looked up.
KINDS = {"all of both": (6, 6), "some of both": (6, 4), "of one": (4, 0)}


def memory(config, streams, kinds):
    """The least with which so many layers stream."""
    profile = load_profile("demo")
    for count in range(10**7, 10**8, 10**5):
        try:
            plan = make_plan(config, count, profile, "float32", kinds, 0)
        except ValueError:
            continue
        if (len(plan.streamed["gen"]), len(plan.streamed["und"])) == streams:
            return count
    raise AssertionError(streams)


def answers(model):
    thought, image = model.run(["a star"], think=True, max_think_tokens=6, seed=2, **FEW)
    drawn = model.run_many([Request(["a red circle"], seed=1, **FEW), Request(["a blue square"], seed=2, **FEW)])
    edit = model.edit(Image.new("RGB", (32, 32), "red"), "make it green", seed=1, **FEW)
    said = model.understand(edit, "what color is it?", max_think_tokens=4)
    return [thought, said, *(np.asarray(picture) for picture in (image, drawn[0][0], drawn[1][0], edit))]


@pytest.fixture(scope="module")
def resident():
    found = {}

    def get(kind):
        if kind not in found:
            model = bagel_opt.load(device="cpu", quantization=kind)
            found[kind] = model, answers(model)
        return found[kind]

    return get


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        (None, "some of both"),
        *(
            pytest.param(kind, streams, marks=pytest.mark.second)
            for kind, streams in (
                (None, "all of both"),
                (None, "of one"),
                ("fp8", "some of both"),
                ("int8", "all of both"),
                ("int4", "of one"),
            )
        ),
    ],
)
def test_as_if_all_lay_there(resident, kind, streams):
    model, want = resident(kind)
    count = memory(model.config, KINDS[streams], dict.fromkeys(("und", "gen"), kind) if kind else {})
    capped = bagel_opt.load(device="cpu", quantization=kind, memory=count)
    plan = capped.runtime.plan
    for _ in range(2):  # what streams for the next program is there, or comes
        for got, wanted in zip(answers(capped), want, strict=True):
            np.testing.assert_array_equal(got, wanted)
    held = sum(
        {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in capped.runtime.model.parameters()
        }.values()
    )
    at_host = sum(plan.parts[part] for part in plan.away & {"embed", "head"})  # the visitors are away
    assert held <= plan.resident + at_host


@pytest.mark.usefixtures("quick_ranks")
@pytest.mark.parametrize(
    "parallel", ["auto", *(pytest.param(way, marks=pytest.mark.second) for way in ("guidance", "tensor"))]
)
def test_on_several_ranks(resident, parallel):
    """To each of which the weights come by themselves, for what is shared out, too."""
    model, want = resident(None)
    count = memory(model.config, KINDS["all of both"], {})
    two = bagel_opt.load(device="cpu", memory=count, gpus=2, parallel=parallel)
    try:
        assert len(two.runtime.inner.plan.streamed["und"]) == 6
        for _ in range(2):
            for got, wanted in zip(answers(two), want, strict=True):
                if isinstance(got, str):
                    assert got == wanted
                else:
                    assert np.abs(got.astype(int) - wanted).max() <= 1
        # what streams is launched, never replayed
        assert two.runtime.inner.graphed == GRAPHED
    finally:
        two.close()


@pytest.mark.second
def test_nothing_is_compiled_anew(monkeypatch):
    made, compiler = [], torch.compile

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda part, **how: compiler(part, backend=counting, **how))
    monkeypatch.setattr("bagel_opt.loading.compiles", lambda device: True)
    torch._dynamo.reset()
    model = bagel_opt.load(device="cpu", backend="compile")
    request = Request(["a red circle"], seed=1, **FEW)
    want = model.run_many([request])[0][0]
    count = len(made)
    assert count
    for streams in ("all of both", "of one"):
        capped = bagel_opt.load(device="cpu", backend="compile", memory=memory(model.config, KINDS[streams], {}))
        np.testing.assert_array_equal(capped.run_many([request])[0][0], want)
    assert len(made) == count
    torch._dynamo.reset()


# ---- the parts


def packed(count):
    """Modules that hold nothing but their number."""
    modules = [nn.Linear(3, 2).requires_grad_(False) for _ in range(count)]
    for number, module in enumerate(modules):
        module.weight.fill_(number)
        module.bias.fill_(number)
    return modules, [streaming.Packed([module], CPU) for module in modules]


def test_a_layer_finds_its_own_weights():
    """In whatever order programs come, also where one ends half way; and what comes in next is on its way."""
    modules, each = packed(6)
    copies, ring = [], streaming.Ring(each, CPU)
    copy = ring._copy
    ring._copy = lambda number, at: (copies.append(number), copy(number, at))
    for order in ([*range(6)] * 3, [0, 1, 2], [*range(6)], [4, 5], [0]):
        for number in order:
            ring.enter(number)
            assert modules[number].weight.unique().tolist() == [number]
            assert modules[number].bias.unique().tolist() == [number]
            ring.leave(number)
            assert sorted(ring.held) == sorted({(number + 1) % 6, (number + 2) % 6})
    assert copies[:20] == [*range(6), *range(6), *range(6), 0, 1]  # each once a round; the first while the last compute


class Queue:
    """A stream of a GPU: what it was given, in order, of which nothing is done before `finish`."""

    def __init__(self):
        self.work = []

    def wait_event(self, event):
        self.work.append(("wait", event.recorded))


class Event:
    recorded = None

    def record(self, stream):
        self.recorded = object()
        stream.work.append(("record", self.recorded))


def finish(streams, act, choose):
    """Does the streams' work in an order that their events allow."""
    done = {None}
    while waiting := [stream for stream in streams if stream.work]:
        ready = [stream for stream in waiting if stream.work[0][0] != "wait" or stream.work[0][1] in done]
        what, about = choose.choice(ready).work.pop(0)
        if what == "record":
            done.add(about)
        elif what != "wait":
            act(what, about)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_streams_spoils_a_layer(seed, monkeypatch):
    """Whichever of copying and computing is faster at the moment."""
    main, side, held, computed = Queue(), Queue(), [None, None], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    ring = streaming.Ring(packed(6)[1], CPU)
    ring.stream, ring.arrived, ring.left = side, [Event(), Event()], [Event(), Event()]
    ring._copy = lambda number, at: side.work.append(("copy", (number, at)))

    def act(what, about):
        if what == "copy":
            number, at = about
            held[at] = number
        else:  # a layer begins or ends
            assert held[about % 2] == about
            computed.append(about)

    orders = [*range(6)] * 2, [0, 1], [*range(6)], [3], [*range(6)]
    for number in itertools.chain(*orders):
        ring.enter(number)
        main.work += [("begins", number), ("ends", number)]
        ring.leave(number)
    finish([main, side], act, random.Random(seed))
    assert computed[::2] == [*itertools.chain(*orders)]


def test_an_odd_number_cannot_take_turns():
    with pytest.raises(ValueError, match="3 layers stream; the number must be even"):
        streaming.Ring(packed(3)[1], CPU)


def test_a_failing_layer_leaves_the_others_right():
    modules, each = packed(4)
    ring, layers = streaming.Ring(each, CPU), [object() for _ in range(4)]
    fails = [1]

    def run(layer, und, gen):
        if layers.index(layer) in fails:
            raise ValueError("no")
        return modules[layers.index(layer)].weight.unique().tolist()

    runner = streaming.Streamed(run, {layer: {"und": (ring, n)} for n, layer in enumerate(layers)})
    runner(layers[0], None, None)
    with pytest.raises(ValueError, match="no"):
        runner(layers[1], None, None)
    fails.clear()
    assert [runner(layer, None, None) for layer in layers * 2] == [[n] for n in range(4)] * 2


def test_an_expert_that_takes_no_part_does_not_stream():
    _, each = packed(4)
    rings, layer = [streaming.Ring(each[:2], CPU), streaming.Ring(each[2:], CPU)], object()
    runner = streaming.Streamed(lambda *given: given, {layer: {"und": (rings[0], 0), "gen": (rings[1], 0)}})
    runner(layer, "und", None)
    assert (rings[0].held, rings[1].held) == ([0, 1], [-1, -1])
    runner(layer, "und", "gen")
    assert rings[1].held == [0, 1]


def test_what_comes_for_a_call_goes_again():
    """And lies as it lay: convolutions on a GPU have their channels last."""
    conv = nn.Conv2d(4, 8, 3).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 5, 5)
    want, stride, seen = conv(x), conv.weight.stride(), []

    def program(x):
        seen.append(conv.weight.stride())
        return conv(x)

    visiting = streaming.Visiting(program, streaming.Packed([conv], CPU), CPU)
    for _ in range(2):
        assert conv.weight.numel() == 0
        torch.testing.assert_close(visiting(x), want, rtol=0, atol=0)
    assert seen == [stride, stride]
    assert conv.weight.numel() == 0


def test_the_host_has_each_weight_once():
    """Each layer's own memory is free as soon as it is packed."""
    layer = Layer(bagel_opt.load(device="cpu").config.llm).requires_grad_(False)
    gone = [weakref.ref(p.untyped_storage()) for p in layer.parameters()]
    one = streaming.Packed([layer.gen], CPU)
    gc.collect()
    assert {p.untyped_storage().data_ptr() for p in layer.gen.parameters()} == {one.host.data_ptr()}
    assert len(gone) == 2 * len([*layer.gen.parameters()])


# ---- what does not fit


@pytest.fixture(scope="module")
def small(resident):
    """A model with room for little more than a profile of the demo's."""
    return bagel_opt.load(device="cpu", memory=memory(resident(None)[0].config, KINDS["of one"], {}))


def test_more_requests_than_there_is_room_for_take_turns(small, resident, monkeypatch):
    requests, profiles = [Request(["a red circle"], seed=n, **FEW) for n in range(4)], []
    plan, resident = small.runtime.plan, resident(None)[0]
    monkeypatch.setattr(MemoryPlan, "check", lambda plan, profile: profiles.append(profile))
    small.run_many(requests)
    monkeypatch.undo()
    (all_at_once,) = profiles
    assert all_at_once.rows == 8
    need = needed_room(plan.config, all_at_once, plan.dtype, plan.kinds, plan.parts, plan.away)
    monkeypatch.setattr(small.runtime, "plan", dataclasses.replace(plan, room=need - 1))
    want, got = (model.run_many(requests) for model in (resident, small))
    for one, other in zip(got, want, strict=True):
        assert np.abs(np.asarray(one[0]).astype(int) - np.asarray(other[0])).max() <= 1
    monkeypatch.setattr("bagel_opt.api.ProfileError", KeyError)  # not to be tried with fewer
    with pytest.raises(ProfileError):
        small.run_many(requests)


def test_a_request_without_room_is_refused(small, monkeypatch):
    monkeypatch.setattr(small.runtime, "plan", dataclasses.replace(small.runtime.plan, room=10**5))
    with pytest.raises(ProfileError, match=r"this needs .* MB for caches .* leaves 100 kB; use a smaller height"):
        small.generate("a red circle", **FEW)


def test_a_full_device_ends_a_request_alone(monkeypatch):
    """What it had computed is free again, and the next request is answered."""
    model, kept = bagel_opt.load(device="cpu"), []
    programs, cleared = dict(model.runtime.programs), []
    want = np.asarray(model.generate("a red circle", seed=1, **FEW))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(gc.collect() * 0 + (kept[-1]() is None)))

    def full(*inputs):
        big = torch.zeros(1000)
        kept.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    model.runtime.programs |= dict.fromkeys(("generate", "generate_row"), full)
    drawing, writing = Request(["a red circle"], seed=1, **FEW), Request(["hello"], output="text", max_think_tokens=3)
    failed, said = model.run_many([drawing, writing], return_exceptions=True)
    assert isinstance(failed, MemoryError)
    assert "the GPU's memory is full (program 'generate_row'); use a smaller height and width" in str(failed)
    assert failed.__context__ is None
    assert isinstance(said[0], str)
    assert cleared == [True, True] * 3  # each was tried once more: both branches together, and each by itself
    model.runtime.programs |= programs
    np.testing.assert_array_equal(model.generate("a red circle", seed=1, **FEW), want)


def test_step_caches_without_room(monkeypatch):
    """What they remember is no program's, and is told all the same."""
    model, zeros = bagel_opt.load(device="cpu"), torch.zeros

    def full(*shape, **given):
        if isinstance(shape[0], tuple) and len(shape[0]) == 4:  # by order, row and token
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return zeros(*shape, **given)

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(MemoryError, match=r"memory is full .*use a smaller height and width"):
        model.generate("a red circle", step_cache="taylorseer", **FEW)
    model.generate("a red circle", **FEW)


def test_what_earlier_requests_left_makes_room(monkeypatch):
    model = bagel_opt.load(device="cpu")
    generate, want = model.runtime.programs["generate"], np.asarray(model.generate("a red circle", seed=1, **FEW))
    full = [True]
    monkeypatch.setattr(torch.cuda, "empty_cache", full.clear)

    def fits_when_empty(*inputs):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return generate(*inputs)

    model.runtime.programs["generate"] = fits_when_empty
    np.testing.assert_array_equal(model.generate("a red circle", seed=1, **FEW), want)


def test_other_failures_are_told_as_they_are():
    model = bagel_opt.load(device="cpu")

    def broken(*inputs):
        raise RuntimeError("an illegal memory access")

    model.runtime.programs["generate"] = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model.generate("a red circle", seed=1, **FEW)


def test_the_weights_themselves_may_not_fit(monkeypatch):
    def full(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bagel_opt.files.checkpoint.Checkpoint.load", full)
    with pytest.raises(MemoryError, match="no memory left for the weights; load with memory='12GB'"):
        bagel_opt.load(device="cpu")


def test_what_memory_does_not_go_with(tmp_path):
    with pytest.raises(ValueError, match=r"adapters kept apart go beside weights.*merge them: lora="):
        bagel_opt.load(device="cpu", memory="1GB", adapters={"a": tmp_path})
    model = bagel_opt.load(device="cpu", memory="1GB")
    with pytest.raises(ValueError, match="merge them: lora="):
        model.set_adapters({"a": tmp_path})
    model.set_adapters({})
    with pytest.raises(
        ValueError, match=r"memory='1MB': with the weights in this precision and profile 'demo' it takes at least"
    ):
        bagel_opt.load(shipped_model(), device="cpu", memory="1MB")


def test_a_host_with_less(monkeypatch):
    monkeypatch.setattr("bagel_opt.loading.host_memory", lambda: 10**6)
    with pytest.raises(ValueError, match=r"memory='40MB' leaves .* to the host, which has 1 MB; use quantization"):
        bagel_opt.load(device="cpu", memory="40MB")


@pytest.mark.usefixtures("quick_ranks")
def test_a_host_with_less_than_all_ranks_leave_to_it(monkeypatch):
    """Each has a copy of its own."""
    host = bagel_opt.load(device="cpu", memory="40MB").runtime.plan.host
    monkeypatch.setattr("bagel_opt.loading.host_memory", lambda: int(1.9 * host))
    assert bagel_opt.load(device="cpu", memory="40MB").runtime.plan.host == host
    with pytest.raises(ValueError, match=r"memory='40MB' leaves .* to the host for each of 2 ranks, which has"):
        bagel_opt.load(device="cpu", memory="40MB", gpus=2)
    assert bagel_opt.load(device="cpu", memory="40MB").runtime.plan.host == host
