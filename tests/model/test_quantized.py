"""Products in 8 bits against references of another kind: tables of all codes, sums in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import CODES, nearest, rounded
from support import examples, relative

from bagel_opt.model.linear import Linear
from bagel_opt.model.quantized import DTYPES, to_codes

KINDS = list(DTYPES)
ERRORS = {"fp8": (0.03, 0.045), "int8": (0.007, 0.01)}  # of a product of normal numbers


def quantized(kind, rows=24, channels=64, bias=True, seed=0):
    """A product in 8 bits, and the weight that it stands for."""
    torch.manual_seed(seed)
    layer = Linear(channels, rows, bias).requires_grad_(False)
    weight = layer.weight.clone()
    layer.quantize(kind)
    layer.quantized.store(weight)
    return layer, weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@examples(100)
@given(data=st.data())
def test_codes_and_scales(kind, dtype, data):
    """Of any size; rows of zeros too."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shape = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 70))
    most = 4 if dtype == torch.float16 else 30
    sizes = [data.draw(st.sampled_from([0.0, *(10.0**e for e in range(-most, most + 1, 2))])) for _ in range(shape[0])]
    x = (torch.randn(shape, generator=generator) * torch.tensor(sizes)[:, None]).to(dtype)
    codes, scale = to_codes(x, DTYPES[kind])
    want, want_scale = rounded(x, kind)
    assert (codes.dtype, scale.dtype) == (DTYPES[kind], torch.float32)
    assert np.array_equal(codes.double().numpy(), want)
    assert np.array_equal(scale.double().numpy(), want_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_and_what_lies_between(kind):
    """A row whose scale is 1: all codes, and the middles of all pairs."""
    table = torch.from_numpy(CODES[kind]).float()
    row = torch.cat((table, (table[1:] + table[:-1]) / 2, -table))[None]
    codes, scale = to_codes(row, DTYPES[kind])
    assert scale.item() == pytest.approx(1, abs=1e-7)
    assert np.array_equal(codes[0].double().numpy(), nearest(row[0].double().numpy(), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product(kind, dtype, bias):
    layer, weight = quantized(kind, rows=96, channels=512, bias=bias)
    x = torch.randn(3, 50, 512).to(dtype)
    (x_codes, x_scale), (w_codes, w_scale) = (rounded(tensor, kind) for tensor in (x, weight))
    exact = (x_codes @ w_codes.T) * x_scale[..., None] * w_scale
    exact = torch.from_numpy(exact + (layer.bias.double().numpy() if bias else 0))
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (3, 50, 96))
    assert relative(got.double(), exact) < (1e-6 if dtype == torch.float32 else 3e-3)
    plain = x.double() @ weight.double().T + (layer.bias.double() if bias else 0)
    least, most = ERRORS[kind]
    assert least < relative(got.double(), plain) < most


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(data=st.data())
def test_a_token_is_its_own(kind, data):
    """Neither where it stands, nor how many others there are, nor what they are matters to it."""
    layer, _ = quantized(kind)
    token = torch.randn(64)
    want = layer(token[None, None])[0, 0]
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    factor = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e30, float("inf"), float("nan")]))
    others = torch.randn(rows, length, 64) * factor
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, length - 1))
    others[row, place] = token
    assert relative(layer(others)[row, place], want) < 1e-6
    codes = to_codes(others, DTYPES[kind])
    for got, alone in zip(codes, to_codes(token[None], DTYPES[kind]), strict=True):
        assert torch.equal(got[row, place].float(), alone[0].float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(kind, value):
    """In all that a token gives; in the one channel that a weight gives."""
    layer, weight = quantized(kind)
    x = torch.randn(2, 5, 64)
    x[1, 2, 3] = value
    finite = layer(x).isfinite()
    assert not finite[1, 2].any()
    finite[1, 2] = True
    assert finite.all()
    weight[7, 3] = value
    layer.quantized.store(weight)
    finite = layer(torch.randn(2, 5, 64)).isfinite()
    assert not finite[..., 7].any()
    finite[..., 7] = True
    assert finite.all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_beyond_its_dtype_is_infinite(kind):
    """As it is without quantisation."""
    layer, weight = quantized(kind, bias=False)
    x = (6e4 * weight[0].sign()).half()[None]
    assert not layer(x).isfinite().all()
    assert layer(x.float()).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_stores(kind):
    """A byte for each weight, 4 for each channel; nothing of the weight is left."""
    layer, weight = quantized(kind)
    assert {name: p.nbytes for name, p in layer.named_parameters()} == {
        "bias": 24 * 4,
        "quantized.codes": weight.numel(),
        "quantized.scale": 24 * 4,
    }


@pytest.mark.second
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_as_eager(kind, dtype):
    """The same codes: one that fell otherwise would show."""
    layer, _ = quantized(kind, rows=96, channels=512)
    x = torch.randn(3, 50, 512).to(dtype)
    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    assert relative(compiled(x), layer(x)) < (1e-6 if dtype == torch.float32 else 1e-3)
