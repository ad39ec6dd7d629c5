"""At BAGEL-7B's own widths: attention and layers with what the extra `flash` brings, and with torch alone, as on most GPUs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import relative

from bagel_opt.bench.contenders import random_model
from bagel_opt.bench.measure import evaluation
from bagel_opt.config import PUBLISHED
from bagel_opt.model import attention
from bagel_opt.model.ops import TorchOps
from bagel_opt.runtime import fused_products
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SLOTS, HEADS, KV_HEADS, CHANNELS = 6144, 28, 4, 128


@pytest.fixture(params=["what is installed", "torch alone"])
def packages(request, monkeypatch):
    if request.param == "torch alone":
        monkeypatch.setattr(attention, "flash_package", lambda: None)
        monkeypatch.setattr(fused_products, "usable", lambda *_: False)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("queries", "causal"), [(4096, False), (2048, False), (2, False), (256, True), (1, True)])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_flash_attention(rows, queries, causal):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, heads, CHANNELS, device="cuda", dtype=torch.bfloat16)
        for length, heads in ((queries, HEADS), (SLOTS, KV_HEADS), (SLOTS, KV_HEADS))
    )
    kv_len = torch.tensor([4354 + 97 * row for row in range(rows)], device="cuda")
    for row, length in enumerate(kv_len):
        k[row, length:], v[row, length:] = 100, -100
    got = attention.attention(q, k, v, kv_len, causal, "flash")
    for row, length in enumerate(kv_len.tolist()):
        mine = (x[row : row + 1, :length].transpose(1, 2).float() for x in (q, k, v))
        mask = torch.ones(queries, length, dtype=torch.bool, device="cuda")
        mask = mask.tril(length - queries) if causal else mask
        want = F.scaled_dot_product_attention(*mine, mask, enable_gqa=True).transpose(1, 2)
        assert relative(got[row : row + 1].float(), want) < 1e-2


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("channels", [72, 80])
def test_flash_attention_of_a_vit(channels):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4928, 16, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[:, 4900:], v[:, 4900:] = 100, -100
    ops = TorchOps("flash", of_vit="flash").vit
    got = ops.attend(q, k, v, ops.visible(torch.tensor([4900], device="cuda"), 4928, 4928, causal=False))
    mine = (x.transpose(1, 2).float() for x in (q, k[:, :4900], v[:, :4900]))
    assert relative(got.float(), F.scaled_dot_product_attention(*mine).transpose(1, 2)) < 1e-2


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize(("rows", "latents"), [(2, 4096), (1, 1024), (4, 1024), (2, 256)])
def test_layers(backend, rows, latents):
    """Compiled, as launched, captured and replayed, against eager float32."""
    config = dataclasses.replace(PUBLISHED, llm=dataclasses.replace(PUBLISHED.llm, num_hidden_layers=2))
    model = random_model(config, torch.device("cuda"))
    model.ops = TorchOps(backend)
    compiled = TorchRuntime(prepare(model, compiled=True))
    torch.manual_seed(0)
    once, caches = evaluation(compiled, rows, latents)
    found = [[x.float() for x in once()] for _ in range(3)]
    compiled.give_back(caches)
    plain = random_model(config, torch.device("cuda")).float()
    torch.manual_seed(0)
    want = [x.float() for x in evaluation(TorchRuntime(prepare(plain, compiled=False)), rows, latents)[0]()]
    for outputs in found:
        for got, right in zip(outputs, want, strict=True):
            assert relative(got, right) < 3e-2
