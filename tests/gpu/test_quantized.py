"""Kernels of products in 8 and 4 bits, on a GPU: against what they mean (bagel_opt/model/quantized.py)."""

import pytest
import torch
from torch import nn

from bagel_opt.config import LLMConfig
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.quantized import (
    DTYPES,
    FLOATS,
    from_groups,
    int4_product,
    quantized_product,
    to_codes,
    to_groups,
    to_kind,
)
from bagel_opt.model.transformer import Expert
from bagel_opt.runtime import fused_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = [(1, 3584, 4608), (4, 18944, 3584), (16, 80, 96), (17, 3584, 3584), (300, 3584, 37888)]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(autouse=True)
def kernels():
    torch.manual_seed(0)
    return pytest.importorskip("bagel_opt.runtime.quantized_products")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("m", "c", "n"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product(kind, m, c, n, dtype):
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((m, c), (n, c), (n,)))
    x_codes, x_scale = to_codes(x, DTYPES[kind])
    codes, scale = to_codes(weight, DTYPES[kind])
    for given in (None, bias.to(dtype)):
        want = (x_codes.double() @ codes.double().T) * x_scale[:, None] * scale + (0 if given is None else given)
        got = quantized_product(x_codes, x_scale, codes, scale, given, FLOATS[dtype])
        assert got.dtype == dtype
        assert error(got, want) < 5e-3  # Hopper adds 8-bit floats up in less than float32


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("m", "c", "n"), [*SIZES, (1, 18944, 3584), (3, 4304, 1152), (1, 4304, 1152), (5, 4300, 1152), (8, 3584, 37888)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_with_what_is_not_rounded(kind, m, c, n, dtype):
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((m, c), (n, c), (n,)))
    (codes, scale), x = to_codes(weight, DTYPES[kind]), x.to(dtype)
    for given in (None, bias.to(dtype)):
        want = (x.double() @ codes.double().T) * scale + (0 if given is None else given)
        got = quantized_product(x, None, codes, scale, given, FLOATS[dtype])
        assert got.dtype == dtype
        assert error(got, want) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize(
    ("m", "c", "n"),
    [*SIZES, (1, 4304, 1153), (3, 4304, 1152), (40, 4304, 1152), (3, 4304, 9001), (16, 3584, 37888), (5, 4300, 1152)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_in_groups(kernels, m, c, n, dtype):
    from bagel_opt.runtime.int4_products import unpacked

    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((m, c), (n, c), (n,)))
    codes, scale = to_groups(weight)
    assert torch.equal(unpacked(codes, scale, c, dtype), from_groups(codes, scale, c, dtype))
    held, x = from_groups(codes, scale, c, torch.float64), x.to(dtype)
    for given in (None, bias.to(dtype)):
        want = x.double() @ held.T + (0 if given is None else given)
        got = int4_product(x, codes, scale, given)
        assert got.dtype == dtype
        assert error(got, want) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("kind", DTYPES)
def test_neighbours_of_a_token_change_nothing(kernels, kind):
    """Not even those that are not finite, up to as many as a tensor core takes."""
    weight, x = (torch.randn(*shape, device="cuda") for shape in ((4608, 3584), (8, 3584)))
    codes, scale = to_kind(weight, kind)
    found = []
    for poison in (torch.nan, 1e4, 0.0):
        x[1:] = poison
        given = x.bfloat16(), codes, scale, None
        found.append(
            int4_product(*given) if kind == "int4" else quantized_product(given[0], None, *given[1:], "bfloat16")
        )
    assert found[0][0].isfinite().all()
    assert all(torch.equal(y[0], found[0][0]) for y in found)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("channels", [64, 3584, 4304])
def test_one_token_in_compiled_code(kernels, kind, channels):
    layer = Linear(channels, 256, device="cuda").to(torch.bfloat16).requires_grad_(False)
    weight = layer.weight
    layer.quantize(kind)
    layer.quantized.store(weight)
    x = torch.randn(1, 1, channels, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    assert error(torch.compile(layer, dynamic=False, fullgraph=True)(x), layer(x)) < 1e-2


@pytest.mark.parametrize("c", [64, 3584, 18944])
@pytest.mark.parametrize("normed", [False, True])
def test_codes_in_one_pass(kernels, c, normed):
    x = torch.randn(300, c, device="cuda", dtype=torch.bfloat16)
    norm = nn.RMSNorm(c, 1e-6).to("cuda", torch.bfloat16)
    norm.weight.data.normal_(1, 0.1)
    codes, scale = kernels.float_codes(x, norm if normed else None)
    want, want_scale = to_codes(norm(x) if normed else x, torch.float8_e4m3fn)
    assert error(scale, want_scale) < 1e-6
    assert (codes.view(torch.uint8) != want.view(torch.uint8)).float().mean() < 1e-3


def test_what_is_not_finite_shows_in_its_own_row(kernels):
    x = torch.randn(4, 3584, device="cuda", dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    codes, scale = kernels.float_codes(x)
    finite = (codes.float() * scale[:, None]).isfinite().all(1)
    assert finite.tolist() == [True, False, False, True]


def test_fused_products_are_the_expert():
    fused = pytest.importorskip("bagel_opt.runtime.fused_fp8", exc_type=ImportError)
    if not fused_products.usable_fp8(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    with torch.device("cuda"):
        expert = Expert(LLMConfig(512, 1024, 1, 4, 2, 10)).to(torch.bfloat16).requires_grad_(False)
        x, attended = torch.randn(2, 300, 512).bfloat16(), torch.randn(2, 300, 4, 128).bfloat16()
    for product in (expert.qkv, expert.o, expert.gate_up, expert.down):
        weight = product.weight
        product.quantize("fp8")
        product.quantized.store(weight)
    joined = torch.cat([part.flatten(2) for part in expert.qkv(expert.norm1(x))], dim=-1)
    assert error(fused.entered(expert, x), joined) < 1e-2
    assert error(fused.left(expert, x, attended), expert.finish(x, attended)) < 1e-2


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_a_table(kind, dtype):
    """The same bits as on the CPU, and under torch.compile."""
    tables = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        table = Embedding(300, 200).to(dtype).requires_grad_(False)
        weight = table.weight
        table.quantize(kind)
        table.quantized.store(weight)
        tables[device] = table.to(device)
    ids = torch.randint(300, (2, 5))
    want = tables["cpu"](ids)
    for read in (tables["cuda"], torch.compile(tables["cuda"], dynamic=False, fullgraph=True)):
        assert torch.equal(read(ids.cuda()).cpu(), want)
    assert torch.equal(tables["cuda"].row(7).cpu(), tables["cpu"](torch.tensor([7]))[0])
