"""Products with weights that are stored in another dtype than they are multiplied in."""

import pytest
import torch
import torch.nn.functional as F

from bagel_opt.config import LLMConfig
from bagel_opt.model.linear import Linear, product, stored
from bagel_opt.model.transformer import QKV, GateUp

CONFIG = LLMConfig(64, 96, 1, 4, 2, 10)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYERS = {
    "plain": lambda: Linear(64, 24),
    "no bias": lambda: Linear(64, 24, bias=False),
    "qkv": lambda: QKV(CONFIG),
    "gate_up": lambda: GateUp(64, 48, bias=False),
}


def by_torch(layer, x):
    """One product by torch, of weights that were cast before."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_product_is_in_the_dtype_of_x_as_of_cast_weights(kind, given, kept):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]().to(kept), torch.randn(2, 5, 64).to(given)
    want = by_torch(layer, x)
    if kind == "qkv":
        want = want.unflatten(-1, (8, 16)).split([4, 2, 2], dim=2)
    got = layer(x)
    if kind == "gate_up":
        want = want[..., :24], want[..., 24:]
    for a, b in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True):
        assert a.dtype == given
        assert torch.equal(a, b)


def test_a_bias_may_be_stored_in_a_dtype_of_its_own():
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.double()
    assert torch.equal(layer(x), by_torch(layer, x))


def test_weights_of_the_right_dtype_are_taken_as_they_lie():
    """Without a copy."""
    layer, x = Linear(8, 4), torch.randn(3, 8)
    assert stored(layer.weight, x) is layer.weight


@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_spans_of_the_channels_out(kept, biased):
    """Side by side; the others are poison."""
    weight, bias, x = torch.randn(24, 8).to(kept), torch.randn(24).to(kept), torch.randn(2, 1, 8)
    spans, others = ((3, 8), (20, 24)), [*range(3), *range(8, 20)]
    want = F.linear(x, weight.to(x.dtype), bias.to(x.dtype) if biased else None)
    weight[others], bias[others] = torch.nan, torch.nan
    got = product(x, weight, bias if biased else None, spans)
    assert torch.allclose(got, torch.cat([want[..., a:b] for a, b in spans], dim=-1), atol=1e-6)


def test_the_shapes_of_joint_products():
    q, k, v = QKV(CONFIG)(torch.randn(2, 5, 64))
    assert [tuple(part.shape) for part in (q, k, v)] == [(2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 2, 16)]
    gate, up = GateUp(64, 48, bias=False)(torch.randn(2, 5, 64))
    assert gate.shape == up.shape == (2, 5, 24)
