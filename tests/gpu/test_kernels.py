"""Kernels in Triton, against float64."""

import pytest
import torch
import torch.nn.functional as F
from support import relative

if torch.cuda.is_available():
    from bagel_opt.runtime import group_norm, one_token

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LIMIT = {torch.bfloat16: 3e-3, torch.float32: 1e-6}


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
