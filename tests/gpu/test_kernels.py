"""Kernels in Triton, against float64."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from support import relative

if torch.cuda.is_available():
    from bagel_opt.model import one_query
    from bagel_opt.runtime import group_norm, inbox, one_token

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
MOST = 2**19  # words of an inbox
LIMIT = {torch.bfloat16: 5e-3, torch.float32: 5e-6}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("channels", [32, 64, 96, 128, 512])  # 96 is no power of two: torch's own
@pytest.mark.parametrize("size", [(3, 2), (5, 7), (128, 96), (1024, 64)])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_group_norm_and_silu(dtype, channels, size, order):
    x = (torch.randn(1, channels, *size, device="cuda") * 2 + 5).to(dtype).to(memory_format=order)
    weight, bias = (torch.randn(channels, device="cuda").to(dtype) for _ in range(2))
    want = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-6))
    got = group_norm.norm_silu(x, weight, bias, 1e-6)
    if channels != 96:
        assert got.is_contiguous(memory_format=order)
    assert relative(got.double(), want) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "c", "wide"), [(7, 5, 0), (4608, 3584, 0), (4608, 3584, 64), (3584, 18944, 0)])
def test_the_product_with_a_single_token(dtype, biased, n, c, wide):
    """wide: channels of adapters beside the weight's own."""
    weight = torch.randn(n, c + wide, device="cuda").to(dtype)[:, :c]
    x, bias = torch.randn(1, 1, c, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype) if biased else None
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = one_token.linear(x, weight, bias)
    assert got.shape == want.shape
    assert relative(got.double(), want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spans", [((1792, 3584), (3584, 4608)), ((3, 8), (100, 101)), ((0, 5), (5, 12))])
def test_the_product_of_spans_with_a_single_token(dtype, biased, spans):
    """Their rows of the weight alone count: all others are poison."""
    weight, bias = torch.full((4608, 3584), torch.nan, device="cuda"), torch.full((4608,), torch.nan, device="cuda")
    for a, b in spans:
        weight[a:b].normal_()
        bias[a:b].normal_()
    x, weight, bias = torch.randn(1, 1, 3584, device="cuda").to(dtype), weight.to(dtype), bias.to(dtype)
    found = one_token.linear(x, weight, bias if biased else None, spans)
    for got, (a, b) in zip(found.split([b - a for a, b in spans], dim=-1), spans, strict=True):
        want = F.linear(x.double(), weight[a:b].double(), bias[a:b].double() if biased else None)
        assert got.shape == want.shape
        assert relative(got.double(), want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels"), [(28, 4, 128), (16, 2, 128), (12, 12, 64), (6, 1, 32), (4, 2, 16)]
)
@pytest.mark.parametrize("lengths", [[0], [1], [4999], [0, 64, 65, 700, 1], [300] * 16])
def test_attention_of_one_query(dtype, heads, kv_heads, channels, lengths):
    """In rows of a larger cache, where all that is no key is poison. A row alone is bit for bit what it is among as many."""
    rows, slots = len(lengths), max(lengths) + 3
    q = torch.randn(rows, 1, heads, channels, device="cuda").to(dtype)
    assert one_query.fits(q, q[:, :, :kv_heads])
    both = torch.full((2, rows + 1, slots + 5, kv_heads, channels), torch.nan, device="cuda").to(dtype)
    for row, length in enumerate(lengths):
        both[:, row, :length].normal_()
    k, v = both[:, :rows, :slots]
    kv_len = torch.tensor(lengths, device="cuda")
    got = one_query.attend(q, k, v, kv_len)
    for row, length in enumerate(lengths):
        mine = (x[row : row + 1].transpose(1, 2).double() for x in (q, k[:, :length], v[:, :length]))
        want = F.scaled_dot_product_attention(*mine, enable_gqa=True).transpose(1, 2) if length else q[row] * 0
        assert relative(got[row].double() + 1, want[0].double() + 1) < LIMIT[torch.bfloat16]
    changed = one_query.attend(q.flip(0), k.flip(0), v.flip(0), kv_len.flip(0))
    assert torch.equal(changed.flip(0), got)


@pytest.fixture(params=[2, 3])
def inboxes(request):
    """Of ranks that are streams of one GPU."""
    size, counters = request.param, request.param * inbox.PROGRAMS
    words = 2 * size * MOST
    all_own = [
        [torch.zeros(words, dtype=torch.int32, device="cuda"), torch.zeros(counters, dtype=torch.int64, device="cuda")]
        for _ in range(size)
    ]
    return [inbox.Inbox(own, all_own, rank) for rank, own in enumerate(all_own)]


def test_small_gathers(inboxes):
    """Launched and replayed, of all sizes, one rank ahead of another."""
    streams, graphs = [torch.cuda.Stream() for _ in inboxes], []
    sizes = [2, 3584, 7168, 8 * 3584, 3 * inbox.BLOCK * inbox.PROGRAMS + 10, 2 * MOST]
    # of each rank by itself: as parts of one tensor they are aligned in several ways, for which Triton has several kernels, and
    # loading one waits until no other runs
    given = [[torch.randn(n, device="cuda").bfloat16() for _ in inboxes] for n in sizes]
    found = [[torch.zeros(len(inboxes), n, device="cuda").bfloat16() for n in sizes] for _ in inboxes]

    def gather(rank):
        for x, out in zip(given, found[rank], strict=True):
            inboxes[rank].gather(x[rank], out)

    def check():
        for outs in found:
            for out, x in zip(outs, given, strict=True):
                assert torch.equal(out, torch.stack(x))

    torch.cuda.synchronize()
    for rank in range(len(inboxes)):
        with torch.cuda.stream(streams[rank]):
            gather(rank)
    torch.cuda.synchronize()
    check()
    for rank in range(len(inboxes)):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=streams[rank]):
            gather(rank)
    for _ in range(100):
        for x in itertools.chain(*given):
            x.normal_()
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_of_what_all_ranks_have(inboxes, dtype):
    """Alike on all, launched and between gathers; and as rounded once."""
    streams = [torch.cuda.Stream() for _ in inboxes]
    for n in (2, 3584, 8 * 3584, 3 * inbox.BLOCK * inbox.PROGRAMS + 10):
        x = torch.randn(n, device="cuda").to(dtype)
        parts = [torch.randn(n, device="cuda").to(dtype) for _ in inboxes]
        outs, gathered = (
            [torch.zeros(*shape, n, device="cuda").to(dtype) for _ in inboxes] for shape in ((), (len(inboxes),))
        )
        torch.cuda.synchronize()
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                inboxes[rank].add(x, parts[rank], outs[rank])
                inboxes[rank].gather(parts[rank], gathered[rank])
                inboxes[rank].add(x, parts[rank], outs[rank])
        torch.cuda.synchronize()
        want = (x.double() + sum(part.double() for part in parts)).to(dtype)
        for out, all_parts in zip(outs, gathered, strict=True):
            assert torch.equal(out, outs[0])
            assert relative(out.double(), want.double()) < LIMIT.get(dtype, 3e-3)
            assert torch.equal(all_parts, torch.stack(parts))


def test_gathers_that_wait_for_a_rank_that_is_gone_can_be_ended(inboxes):
    x = torch.zeros(64, device="cuda")
    for _ in range(3):
        inboxes[0].gather(x, x.new_empty(len(inboxes), 64))
    over = torch.cuda.Event()
    over.record()
    time.sleep(0.2)
    assert not over.query()
    inboxes[0].abort()
    over.synchronize()


def test_what_is_too_large_for_an_inbox_is_not_taken(inboxes):
    sizes = {0: False, 1: True, MOST: True, MOST + 1: False}
    assert {n: inboxes[0].takes(torch.empty(n, device="cuda")) for n in sizes} == sizes
    assert not inboxes[0].takes(torch.empty(3, device="cuda", dtype=torch.bfloat16))
