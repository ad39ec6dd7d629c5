"""The attention op against its definition, and the two faults that others have had."""

import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from broken import packages
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, cases, examples, random_inputs, relative

from bagel_opt import installed
from bagel_opt.model import attention, kv_cache
from bagel_opt.model.ops import TorchOps

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
CPU_BACKENDS = ["sdpa", *(["flex"] if AVX512 else [])]  # elsewhere torch's kernel is wrong
torch._dynamo.config.recompile_limit = 64  # FlexAttention compiles for each shape
named = {case.name: case for case in cases()}
FLEX = (4, 2, 5), (4, 4, 5), (7, 1, 1)  # heads, kv_heads, queries, each of which it compiles anew


def by_definition(q_BQHD, k_BSGD, v_BSGD, kv_len_B, causal):
    """Key j is visible to query i iff j < kv_len and, if causal, j <= i + kv_len - Q; one query at a time."""
    out = torch.zeros_like(q_BQHD, dtype=torch.float64)
    rows, queries, heads, channels = q_BQHD.shape
    group = heads // k_BSGD.shape[2]
    for b in range(rows):
        for i in range(queries):
            end = min(kv_len_B[b], i + kv_len_B[b] - queries + 1) if causal else kv_len_B[b]
            for h in range(heads):
                k, v = k_BSGD[b, :end, h // group].double(), v_BSGD[b, :end, h // group].double()
                out[b, i, h] = (k @ q_BQHD[b, i, h].double() / channels**0.5).softmax(0) @ v
    return out


@pytest.mark.parametrize(
    ("backend", "heads", "kv_heads", "queries"),
    [
        pytest.param(*one, marks=[pytest.mark.second] if one[0] == "flex" and one[1:] != (4, 2, 5) else [])
        for one in product(CPU_BACKENDS, (4, 7), (1, 2, 4), (1, 5))
        if one[1] % one[2] == 0 and one[1:3] != (4, 1) and (one[0] != "flex" or one[1:] in FLEX)
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_op_is_its_definition(backend, causal, heads, kv_heads, queries):
    q, k, v, kv_len = random_inputs(3, queries, 24, heads, kv_heads, 16)
    for b, length in enumerate(kv_len):  # what lies beyond kv_len must not matter
        k[b, length:], v[b, length:] = 1e3, -1e3
    got = attention.attention(q, k, v, kv_len, causal, backend)
    assert relative(got.double(), by_definition(q, k, v, kv_len, causal)) < 1e-5


@pytest.mark.parametrize("package", ["flash_attn.cute", "flash_attn", None])
def test_which_vits_flash_attention_4_takes(monkeypatch, package):
    """Those whose heads have a multiple of 8 channels, as both published ones; other packages are no faster than SDPA."""
    monkeypatch.setattr(attention, "flash_package", lambda: package)
    taken = {n for n in (12, 64, 72, 80, 257, 264) if attention.of_vit("flash", n) == "flash"}
    assert taken == ({64, 72, 80} if package == "flash_attn.cute" else set())
    assert attention.of_vit("sdpa", 72) == "sdpa"


def test_a_mask_goes_to_sdpa_where_all_else_is_flash():
    """As of a ViT with windows, for which FlashAttention has no kernel."""
    q, k, v, kv_len = random_inputs(2, 6, 6, 4, 4, 16)
    group = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
    ops = TorchOps("flash", of_vit="flash").vit
    got = ops.attend(q, k, v, ops.within(group, kv_len))
    assert torch.equal(got, TorchOps("sdpa").attend(q, k, v, TorchOps("sdpa").within(group, kv_len)))


@examples(100)
@given(st.data())
def test_write_touches_only_its_slots(data):
    rows, length, slots = (data.draw(st.integers(1, high)) for high in (4, 6, 12))
    length = min(length, slots)
    start = torch.tensor([data.draw(st.integers(0, slots - length)) for _ in range(rows)])
    old, new = torch.randn(rows, slots, 2, 3), torch.randn(rows, length, 2, 3)
    want = old.clone()
    for b in range(rows):
        want[b, start[b] : start[b] + length] = new[b]
    assert torch.equal(kv_cache.write(old, new, start), want)


@pytest.mark.parametrize("name", ["auto2", "", "flash", "cudnn", *([] if AVX512 else ["flex"])])
def test_backends_that_cannot_run_here_are_refused(name):
    with pytest.raises(ValueError, match="attention="):
        attention.choose(name, torch.device("cpu"), torch.float32)


def test_upper_left_causal_mask_breaks_decoding(eager, monkeypatch):
    """vllm-omni's first fault: is_causal=True over a cache lets a new token see the first keys alone."""
    case = named["text_only"]
    assert eager.run(case.inputs, **case.options) == case.outputs
    right = attention.attend

    def upper_left(backend, q, k, v, seen):
        if not seen.causal:
            return right(backend, q, k, v, seen)
        end = int(seen.kv_len_B[0])
        q, k, v = q.transpose(1, 2), k[:, :end].transpose(1, 2), v[:, :end].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(attention, "attend", upper_left)
    assert eager.run(case.inputs, **case.options) != case.outputs


@pytest.mark.parametrize("name", ["text_to_image", "image_editing"])
def test_guidance_branches_that_see_each_other_break_denoising(eager, monkeypatch, name):
    """vllm-omni's second fault: the branches of one request in one sequence, attending to each other."""
    case = named[name]

    def error():
        events = []
        eager.run(case.inputs, on_step=events.append, **case.options)
        return case.velocity_error(events)

    assert error() < 1e-4
    right = attention.attend

    def together(backend, q, k, v, seen):
        rows = len(seen.kv_len_B)
        if rows == 1 or seen.causal:
            return right(backend, q, k, v, seen)
        k, v = (torch.cat([x[b, :end] for b, end in enumerate(seen.kv_len_B)])[None] for x in (k, v))
        q = q.flatten(0, 1)[None]
        seen = attention.visible(backend, torch.tensor([k.shape[1]]), q.shape[1], k.shape[1], causal=False)
        return right(backend, q, k, v, seen).unflatten(1, (rows, -1))[0]

    monkeypatch.setattr(attention, "attend", together)
    assert error() > 1e-2


def test_the_compiler_is_imported_where_it_is_used():
    """It takes longer than all else that loading a small model does."""
    script = (
        "import sys, bagel_opt; bagel_opt.load().chat('hi', max_think_tokens=2); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


# ---- FlashAttention that is installed and broken

GOOD = "def {}(*_, **__): ..."
FOUR, THREE, TWO = (GOOD.format(function) for _, function in attention.FLASH.values())
BROKEN = "raise ImportError('undefined symbol: _ZN3c10')"


@pytest.mark.parametrize(
    ("files", "found", "warns"),
    [
        ({}, None, []),
        ({"flash_attn__cute": FOUR}, "flash_attn.cute", []),
        ({"flash_attn__cute": FOUR, "flash_attn": TWO}, "flash_attn.cute", []),
        ({"flash_attn__cute": FOUR, "flash_attn": BROKEN}, None, ["flash-attn-4", "flash-attn"]),
        ({"flash_attn": BROKEN}, None, ["flash-attn"]),  # and not flash-attn-4, which would lie in it
        ({"flash_attn__cute": "import cutlass"}, None, ["flash-attn-4"]),
        ({"flash_attn__cute": "import cutlass", "flash_attn": TWO}, "flash_attn", ["flash-attn-4"]),
        ({"flash_attn__cute": "", "flash_attn_interface": THREE}, "flash_attn_interface", ["flash-attn-4"]),
        ({"flash_attn_interface": "raise OSError", "flash_attn": TWO}, "flash_attn", ["flash-attn-3"]),
    ],
)
def test_a_broken_flash_attention_gives_way_to_the_next_one(files, found, warns, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    with packages(monkeypatch, tmp_path, **files):
        assert [attention.flash_package() for _ in range(2)] == [found] * 2
        lines = [record.getMessage() for record in caplog.records]
        assert [line.split()[0] for line in lines] == warns
        instead = attention.FLASH[found][0] if found else "torch's own kernels"
        assert all(f"so attention runs by {instead}, more slowly; " in line for line in lines)
        name = attention.FLASH[found][0] if found else "torch's FlashAttention 2"
        assert attention.described("flash") == name


def test_flash_attention_knows_where_it_keeps_kernels_as_it_is_imported(tmp_path, monkeypatch):
    """Later is too late: it, and quack-kernels that it imports, read these variables once."""
    reads = "import os\nkept = [os.environ[name] for name in {}]\n".format(
        ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"]
    )
    with packages(monkeypatch, tmp_path, flash_attn__cute=reads + FOUR):
        assert attention.flash_package() == "flash_attn.cute"
        enabled, *folders = sys.modules["flash_attn.cute"].kept
        assert enabled == "1"
        assert folders == [str(installed.kernel_folder(name)) for name in installed.KERNELS]


def test_the_line_on_a_broken_flash_attention(tmp_path, monkeypatch, caplog):
    with packages(monkeypatch, tmp_path, flash_attn__cute=BROKEN, flash_attn_interface="raise OSError('libtorch.so')"):
        attention.flash_package()
    assert [record.getMessage() for record in caplog.records] == [
        "flash-attn-4 is installed but cannot be imported (undefined symbol: _ZN3c10), so attention runs by torch's own "
        "kernels, more slowly; pip install 'bagel-opt[flash]' installs what was tried together",
        "flash-attn-3 is installed but cannot be imported (libtorch.so), so attention runs by torch's own kernels, more "
        "slowly; build it for this torch, or pip uninstall flash-attn-3",
    ]


@pytest.mark.parametrize(
    ("capability", "package", "kernels", "auto", "refused"),
    [
        ((9, 0), True, False, "flash", None),
        ((9, 0), False, True, "flash", None),
        ((9, 0), False, False, "sdpa", "which this torch is built without: pip install 'bagel-opt"),
        ((7, 5), True, True, "sdpa", "needs a GPU of compute capability 8.0"),
    ],
)
def test_flash_attention_is_chosen_where_any_runs(capability, package, kernels, auto, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: kernels)
    cuda = torch.device("cuda")
    with packages(monkeypatch, tmp_path, **({"flash_attn__cute": FOUR} if package else {})):
        assert attention.choose("auto", cuda, torch.bfloat16) == auto
        assert attention.choose("auto", cuda, torch.float32) == "sdpa"
        if refused is None:
            assert attention.choose("flash", cuda, torch.float16) == "flash"
            return
        with pytest.raises(ValueError, match=refused):
            attention.choose("flash", cuda, torch.float16)
