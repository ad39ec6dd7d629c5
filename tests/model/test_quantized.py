"""Products in 8 and 4 bits against references of another kind: tables of all codes, sums in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounding import CODES, nearest, rounded, unpacked
from support import examples, relative

from bagel_opt.model import quantized as module
from bagel_opt.model.linear import Embedding, Linear
from bagel_opt.model.quantized import DTYPES, from_groups, to_codes, to_groups, to_kind
from bagel_opt.quantization import KINDS

OF_TOKENS = ["fp8", "int8"]  # kinds to which what comes in is rounded, too
ERRORS = {"fp8": (0.03, 0.045), "int8": (0.007, 0.01), "int4": (0.05, 0.07)}  # of a product of normal numbers


def quantized(kind, rows=24, channels=64, bias=True, seed=0):
    """A product in 8 or 4 bits, and the weight that it stands for."""
    torch.manual_seed(seed)
    layer = Linear(channels, rows, bias).requires_grad_(False)
    weight = layer.weight.clone()
    layer.quantize(kind)
    layer.quantized.store(weight)
    return layer, weight


@pytest.mark.parametrize("kind", OF_TOKENS)
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


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_every_code_and_what_lies_between(kind):
    """A row whose scale is 1: all codes, and the middles of all pairs."""
    table = torch.from_numpy(CODES[kind]).float()
    row = torch.cat((table, (table[1:] + table[:-1]) / 2, -table))[None]
    codes, scale = to_codes(row, DTYPES[kind])
    assert scale.item() == pytest.approx(1, abs=1e-7)
    assert np.array_equal(codes[0].double().numpy(), nearest(row[0].double().numpy(), kind))


@examples(100)
@given(data=st.data())
def test_groups(data):
    """Each number is the nearest level of its group, and the group errs no more than with its full range."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rows, channels = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    sizes = [data.draw(st.sampled_from([0.0, *(10.0**e for e in range(-30, 31, 6))])) for _ in range(rows)]
    weight = torch.randn(rows, channels, generator=generator) * torch.tensor(sizes)[:, None]
    codes, scale = to_groups(weight)
    groups = -(-channels // 32)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (
        torch.uint8,
        (rows, groups * 16),
        torch.bfloat16,
        (rows, groups),
    )
    got, want = unpacked(codes, scale, channels), weight.double().numpy()
    for row in range(rows):
        for group in range(groups):
            mine, by = slice(group * 32, min(channels, group * 32 + 32)), float(scale[row, group])
            x, q = want[row, mine], got[row, mine]
            assert np.allclose(q, np.clip(np.round(x / (by or 1)), -8, 7) * by, rtol=1e-6, atol=abs(by) * 1e-6)
            full = x[np.abs(x).argmax()] / -8
            plain = np.clip(np.round(x / (full or 1)), -8, 7) * full
            exact = np.abs(plain - x) + 0.004 * np.abs(x)  # a scale has 8 bits
            assert np.square(q - x).sum() <= np.square(exact).sum() + 1e-60


def test_what_16_levels_hold_is_kept():
    """Whichever end of its group the largest lies at."""
    torch.manual_seed(0)
    levels = torch.randint(-7, 7, (40, 96)).float()
    levels[:, ::32] = -8
    weight = levels * torch.tensor([1.0, -0.5, 2.0**-20, -(2.0**20)]).repeat(10)[:, None]
    codes, scale = to_groups(weight)
    assert torch.equal(from_groups(codes, scale, 96, torch.float32), weight)
    assert np.array_equal(unpacked(codes, scale, 96), weight.double().numpy())


@pytest.mark.parametrize("channels", [512, 520])
def test_what_a_product_in_groups_is(channels):
    layer, _ = quantized("int4", rows=96, channels=channels)
    x, held = torch.randn(3, 50, channels), layer.quantized
    exact = x.double().numpy() @ unpacked(held.codes, held.scale, channels).T + layer.bias.double().numpy()
    assert relative(layer(x).double(), torch.from_numpy(exact)) < 1e-6
    half = x.bfloat16()
    assert layer(half).dtype == torch.bfloat16
    assert relative(layer(half).double(), layer(half.float()).double()) < 5e-3


@pytest.mark.parametrize("kind", OF_TOKENS)
@pytest.mark.parametrize("shape", [(5, 1, 512), (5, 512), (1, 1, 512)])
def test_a_rows_only_token_is_not_rounded(kind, shape):
    layer, weight = quantized(kind, rows=96, channels=512)
    x, (codes, scale) = torch.randn(shape), rounded(weight, kind)
    exact = x.double().numpy() @ (codes * scale[:, None]).T + layer.bias.double().numpy()
    assert relative(layer(x).double(), torch.from_numpy(exact)) < 1e-6
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_how_much_a_product_errs(kind):
    layer, weight = quantized(kind, rows=96, channels=512)
    x = torch.randn(3, 50, 512)
    least, most = ERRORS[kind]
    plain = x.double() @ weight.double().T + layer.bias.double()
    assert least < relative(layer(x).double(), plain) < most


@pytest.mark.parametrize("kind", OF_TOKENS)
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


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(data=st.data())
def test_a_token_is_its_own(kind, data):
    """Neither where it stands, nor how many others there are, nor what they are matters to it."""
    layer, _ = quantized(kind)
    token = torch.randn(64)
    want = layer(token.expand(1, 2, 64))[0, 0]
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 40))
    factor = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e30, float("inf"), float("nan")]))
    others = torch.randn(rows, length, 64) * factor
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, length - 1))
    others[row, place] = token
    assert relative(layer(others)[row, place], want) < 1e-6
    if kind in OF_TOKENS:
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
    """A byte for each weight and 4 for each channel, or half a byte and 2 for 32 weights; nothing of the weight is left."""
    layer, weight = quantized(kind)
    codes, scale = (weight.numel() // 2, weight.numel() // 16) if kind == "int4" else (weight.numel(), 24 * 4)
    assert {name: p.nbytes for name, p in layer.named_parameters()} == {
        "bias": 24 * 4,
        "quantized.codes": codes,
        "quantized.scale": scale,
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


# ---- tables


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind):
    """In any shape of ids, with all that their codes stand for; a row that is not finite shows, alone."""
    torch.manual_seed(0)
    table = Embedding(40, 72).requires_grad_(False)
    weight = table.weight
    weight[3, 5], weight[4, 6] = torch.nan, torch.inf
    table.quantize(kind)
    table.quantized.store(weight)
    assert table.weight is None
    finite = torch.tensor([number for number in range(40) if number not in (3, 4)])
    if kind == "int4":
        want = unpacked(*to_groups(weight), 72)
    else:
        codes, scale = rounded(weight, kind)
        want = codes * scale[:, None]
    got = table(torch.arange(40).view(2, 4, 5))
    assert got.shape == (2, 4, 5, 72)
    assert np.array_equal(got.flatten(0, 2)[finite], want[finite].astype(np.float32))
    assert not got.flatten(0, 2)[3:5].isfinite().all(-1).any()
    assert all(torch.equal(table.row(number), table(torch.tensor(number))) for number in finite[:5].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_after_others_are_all(kind, monkeypatch):
    weight = torch.randn(50, 40)
    want = to_kind(weight, kind)
    monkeypatch.setattr(module, "AT_ONCE", 130)
    monkeypatch.setattr(module, "AT_ONCE_IN_GROUPS", 130)
    made = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: made.append(len(parts)) or cat(parts))
    assert all(map(torch.equal, to_kind(weight, kind), want))
    assert made[:2] == [17, 17]


def test_a_large_weight_on_a_gpu_is_quantised_in_few_pieces():
    """Of a hundred launches each; "meta" is another device than the CPU, too."""
    pieces = []
    module._in_turn(
        lambda rows: (pieces.append(len(rows)) or rows, rows), torch.empty(4096, 3584, device="meta"), 2**17
    )
    assert len(pieces) == 1


def test_no_operator_takes_a_dtype():
    """findings/torch-aoti-dtype-of-an-operator.sh"""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bagel_opt::")]
    assert "bagel_opt::quantized_product" in names
    for name in names:
        arguments = getattr(torch.ops.bagel_opt, name.removeprefix("bagel_opt::")).default._schema.arguments
        assert not any("ScalarType" in str(argument.real_type) for argument in arguments), name
