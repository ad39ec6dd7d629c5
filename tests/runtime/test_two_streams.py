"""What runtime/two_streams.py puts together in another way than the model does, on the CPU: without streams or compilation."""

import contextlib
import functools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import relative

from bagel_opt.config import LLMConfig
from bagel_opt.model import attention
from bagel_opt.model.linear import Linear, LowRank
from bagel_opt.model.ops import TorchOps
from bagel_opt.model.rotary import rope
from bagel_opt.model.transformer import Layer, run_layer
from bagel_opt.runtime import cuda_graphs, fused_products, split_layers, split_weights
from bagel_opt.runtime import two_streams as streams
from bagel_opt.runtime.groups import Group


def plain_product(x, weight, bias=None, residual_MN=None):
    return F.linear(x, weight, bias) + (0 if residual_MN is None else residual_MN)


def plain_gated_product(x, weight):
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


class Stream:
    def wait_stream(self, other):
        """Everything on the CPU is in order."""


def on_the_cpu(fused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(fused_products, "LEAST_ROWS", 4)
    monkeypatch.setattr(fused_products, "product", plain_product)
    monkeypatch.setattr(fused_products, "gated_product", plain_gated_product)
    found = object.__new__(streams.TwoStreams)
    found.side, found.way, found.shared = Stream(), streams.Way(fused), (None,)
    return found


@pytest.fixture(params=[False, True], ids=["compiled", "fused"])
def two_streams(request, monkeypatch):
    monkeypatch.setattr(streams, "compiled", lambda piece: piece)
    return on_the_cpu(request.param, monkeypatch)


def adapt(layer):
    """Random factors of two adapters in all products, beside the weights where fused kernels want them there."""
    for product in [m for m in layer.modules() if isinstance(m, Linear)]:
        product.low_rank = LowRank(6, (product.in_features, product.out_features), torch.float32, torch.device("cpu"))
        product.low_rank.down_RC.normal_()
        product.low_rank.up_NR.normal_(0, 0.1)
        product.low_rank.of_R[3:] = 1
    for expert in (layer.und, layer.gen):
        expert.qkv.widen()
        expert.gate_up.widen()
    return torch.tensor([[1.0, 0.0], [0.5, 2.0]])


def program(rows, text, latents, slots=16):
    """What a layer is given by a program with so many new tokens."""
    start = torch.tensor([3, 6])[:rows]
    und, gen = torch.randn(rows, text, 64), torch.randn(rows, latents, 64) if latents else None
    caches = [torch.randn(rows, slots, 2, 16) for _ in range(2)]
    position = torch.tensor([[5], [9]])[:rows] + (0 if latents else torch.arange(text))
    seen = attention.visible("sdpa", start + text + latents, text + latents, slots, causal=not latents)
    return und, gen, *rope(position, 16, 1e4), *caches, start, seen, TorchOps("sdpa")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("rows", "text", "latents"), [(2, 2, 5), (1, 2, 5), (1, 7, 0), (2, 7, 0), (1, 1, 0), (2, 1, 0)]
)
def test_experts_side_by_side_compute_the_layer(two_streams, rows, text, latents, adapted):
    torch.manual_seed(0)
    layer = Layer(LLMConfig(64, 96, 1, 4, 2, 10)).eval().requires_grad_(False)
    share, results = adapt(layer)[:rows] if adapted else None, []
    given = program(rows, text, latents)
    for call in (run_layer, two_streams):
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        with torch.no_grad():
            results.append(call(layer, *own, share))
    for got, want in zip(results[1], results[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_the_side_stream_reads_is_held_until_the_main_one_waits(monkeypatch):
    """An image's markers are one row's, repeated: what makes rows of them is main's memory, which main takes again once freed."""
    monkeypatch.setattr(streams, "compiled", lambda piece: piece)
    runner, read, waits = on_the_cpu(False, monkeypatch), [], []
    main = SimpleNamespace(wait_stream=lambda side: waits.append([x() is not None for x in read]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    layer = Layer(LLMConfig(64, 96, 1, 4, 2, 10)).eval().requires_grad_(False)

    def noted(piece):
        def run(expert, x, *given):
            if expert is layer.und:
                read.append(weakref.ref(x))
            return piece(expert, x, *given)

        return run

    runner.way.enter, runner.way.leave = noted(runner.way.enter), noted(runner.way.leave)
    und, *others = program(rows=2, text=2, latents=5)
    with torch.no_grad():
        runner(layer, und[:1].expand(2, -1, -1), *others)
    assert waits == [[True], [True, True]]


class Threads:
    """A group whose ranks are threads."""

    def __init__(self, size):
        self.size, self.given, self.met = size, [None] * size, threading.Barrier(size, timeout=20)

    def of(self, rank):
        group = SimpleNamespace(size=self.size, rank=rank, gather=lambda x: self.gather(rank, x), inbox=None)
        group.add = functools.partial(Group.add, group)
        return group

    def gather(self, rank, x):
        self.given[rank] = x
        self.met.wait()
        found = torch.stack(self.given)
        self.met.wait()
        return found


@pytest.mark.parametrize("way", ["two streams", "plain"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("rows", "latents", "ranks"), [(2, 6, 2), (1, 5, 2), (2, 7, 3), (2, 4, 3), (1, 1, 2)])
def test_parts_of_the_latents_on_several_ranks_compute_the_layers(
    two_streams, monkeypatch, way, adapted, rows, latents, ranks
):
    """Where they divide and where not; the caches have no slot to spare."""
    torch.manual_seed(0)
    monkeypatch.setattr(split_layers, "compiled", lambda piece: piece)
    layers = [Layer(LLMConfig(64, 96, 1, 4, 2, 10)).eval().requires_grad_(False) for _ in range(2)]
    shares = [adapt(layer) for layer in layers] if adapted else []
    share = shares[0][:rows] if adapted else None
    und, gen, cos, sin, k, v, start, seen, ops = program(rows, 2, latents, slots=8 + latents)

    def run(runner, gen):
        caches = [k.clone(), v.clone()]
        mine = und
        with torch.no_grad():
            for layer in layers:
                mine, gen, *caches = runner(layer, mine, gen, cos, sin, *caches, start, seen, ops, share)
        return mine, gen, *caches

    def rank(number, group):
        exchange = split_layers.Exchange(group.of(number))
        exchange.latents = latents
        plain = split_layers.SplitLayers(exchange, compiles=False)
        runner = two_streams.exchanging(exchange) if way == "two streams" else plain
        return run(runner, gen[:, exchange.mine(gen.device)])

    want, group = run(run_layer, gen), Threads(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank, range(ranks), [group] * ranks))
    together = torch.cat([part for _, part, *_ in found], dim=1)[:, :latents]
    assert relative(together, want[1]) < 1e-5
    for mine, _, *caches in found:
        for got, other in zip((mine, *caches), (want[0], *want[2:]), strict=True):
            assert relative(got, other) < 1e-5


@pytest.mark.parametrize(("rows", "ranks"), [(1, 2), (2, 2), (2, 4)])
def test_parts_of_the_weights_on_several_ranks_compute_a_token(rows, ranks):
    torch.manual_seed(0)
    config = LLMConfig(64, 96, 1, 8, 4, 10)
    layers = [Layer(config).eval().requires_grad_(False) for _ in range(2)]
    und, _, cos, sin, _, _, start, seen, ops = program(rows, 1, 0)
    cos, sin = rope(torch.tensor([[5], [9]])[:rows], 8, 1e4)
    k, v = (torch.randn(rows, 16, 4, 8) for _ in range(2))

    def run(runner):
        x, caches = und, [k.clone(), v.clone()]
        with torch.no_grad():
            for layer in layers:
                x, _, *caches = runner(layer, x, None, cos, sin, *caches, start, seen, ops)
        return x, *caches

    want, group = run(run_layer), Threads(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        runners = [split_weights.SplitWeights(config, group.of(rank), compiles=False) for rank in range(ranks)]
        for found in pool.map(run, runners):
            for got, other in zip(found, want, strict=True):
                assert relative(got, other) < 1e-5


@pytest.mark.parametrize(("vocabulary", "ranks"), [(10, 2), (11, 2), (5, 4)])
def test_parts_of_the_vocabulary_are_in_order(vocabulary, ranks):
    """Where it divides and where not."""
    head, x, group = Linear(64, vocabulary, bias=False).requires_grad_(False), torch.randn(2, 1, 64), Threads(ranks)
    head.weight.normal_()
    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(lambda rank: split_weights.all_logits(head, x[:, 0], group.of(rank)), range(ranks)))
    for found in parts:
        assert relative(found, head(x[:, 0])) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_pieces_are_compiled_once_for_all_sizes(fused, monkeypatch):
    """But for tokens of which each row has one: of one row or of several."""
    made, compiler = [], torch.compile

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda piece, **how: compiler(piece, backend=counting, **how))
    monkeypatch.setattr(streams, "compiled", streams.compiled.__wrapped__)
    runner = on_the_cpu(fused, monkeypatch)
    layers = [Layer(LLMConfig(64, 96, 1, 4, 2, 10)).eval().requires_grad_(False) for _ in range(2)]

    def run(*sizes):
        given = program(*sizes)
        with torch.no_grad():
            for layer in layers:
                runner(layer, *given)

    torch._dynamo.reset()
    run(1, 7, 0)
    run(2, 2, 5)
    first = len(made)
    assert first == 2
    for sizes in ((1, 4, 5), (2, 4, 64, 80), (1, 16, 0, 32), (2, 4, 9, 40), (1, 64, 0, 128)):
        run(*sizes)
    assert len(made) == first
    run(2, 1, 0)
    run(1, 1, 0)
    assert len(made) == first + 4
    run(2, 1, 0, 48)
    run(1, 1, 0, 48)
    assert len(made) == first + 4


def test_caches_of_one_batch_after_another_share_memory():
    memory, gone = cuda_graphs.CacheMemory(LLMConfig(64, 96, 3, 4, 2, 10), torch.float32, torch.device("cpu")), []
    small = memory.take(1, 8, gone.append)
    assert {cache.shape for cache in small} == {(1, 8, *small[0].shape[2:])}
    for cache in small:
        cache.fill_(torch.nan)
    place = small[0].data_ptr()
    memory.give_back(small)
    again = memory.take(2, 4, gone.append)
    assert again[0].data_ptr() == place
    assert not torch.stack(again).any()
    assert not gone
    beside = memory.take(1, 8, gone.append)
    assert beside[0].data_ptr() != place
    memory.give_back(again)
    memory.give_back(beside)
    large = memory.take(3, 8, gone.append)
    assert len(gone) == 2
    memory.give_back(large)
    assert memory.take(1, 8, gone.append)[0].data_ptr() == large[0].data_ptr()
    assert len(gone) == 2


def test_a_replayed_graph_reads_what_it_was_given_last():
    """From the host or the device: the same picture may join a context before and after a flow step in that row."""
    graph, seen = object.__new__(cuda_graphs.Graph), []
    graph.inputs, graph.given, graph.outputs = [torch.zeros(3)], [None], []
    graph.graph = SimpleNamespace(replay=lambda: seen.append(graph.inputs[0].tolist()))
    image, noisy = np.ones(3, np.float32), torch.full((3,), 7.0)
    for given in (image, image, noisy, image, noisy):
        graph([given])
    assert [values[0] for values in seen] == [1, 1, 7, 1, 7]


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [  # two rows of 4,096 latent tokens, where these are an H100's fastest; by the rule one row, three, and two of 1,024
        (8192, 3584, fused_products.WIDE),
        (8192, 4608, fused_products.NARROW),
        (4096, 3584, fused_products.NARROW),
        (12288, 3584, fused_products.NARROW),
        (2048, 3584, fused_products.WIDE),
    ],
)
def test_tiles_fill_the_multiprocessors(m, n, tile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert fused_products._tile(torch.empty(m, 1, device="meta"), torch.empty(n, 1, device="meta")) == tile


def test_the_share_of_tiles_that_is_wanted():
    assert fused_products._fill(128 * 4, 256 * 3, fused_products.WIDE, 12) == 1
    assert fused_products._fill(128 * 4, 256 * 3, fused_products.WIDE, 8) == 12 / 16
    assert fused_products._fill(100, 192, fused_products.NARROW, 1) == 100 / 128
