"""The one attention op of PyTorch, and the only place that knows its backends.

    attention(q_BQHD, k_BSGD, v_BSGD, kv_len_B, causal) -> out_BQHD

B rows, Q queries, S slots, H query heads, G key-value heads, D channels per head. Key j is visible to query i iff
j < kv_len and, if causal, j <= i + kv_len - Q: the last query sees all valid keys. These are the semantics of ONNX
Attention (opset 24) with `nonpad_kv_seqlen`. Grouped queries are never expanded.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bagel_opt import installed

BACKENDS = ("sdpa", "cudnn", "flex", "flash")
# FlashAttention 4, 3 and 2, as pip calls them and what is called of each.
FLASH = {
    "flash_attn.cute": ("flash-attn-4", "flash_attn_varlen_func"),
    "flash_attn_interface": ("flash-attn-3", "flash_attn_with_kvcache"),
    "flash_attn": ("flash-attn", "flash_attn_with_kvcache"),
}
SPLIT_KEYS = {"flash_attn_interface", "flash_attn"}  # those that split the keys of one query among multiprocessors

log = logging.getLogger("bagel_opt")

# Compiled, since it would otherwise materialise all scores; where it is first used, since importing torch's compiler takes
# two seconds.
_flex: Callable | None = None


class Visible(NamedTuple):
    """Which keys each query sees, in the form that a backend wants; made once per program and shared by its layers."""

    kv_len_B: Tensor
    causal: bool
    mask: "Tensor | BlockMask | None"


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to use for "auto" or a name of BACKENDS.

    Raises ValueError for an unknown name or one that cannot run on this device and dtype.
    """
    half, cuda = dtype in (torch.float16, torch.bfloat16), device.type == "cuda"
    new = cuda and half and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return "flash" if new and _has_flash() else "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
    if name in ("cudnn", "flash") and not (cuda and half):
        raise ValueError(
            f"attention={name!r} runs on CUDA in bfloat16 or float16, not on {device.type} in {dtype}; use attention='sdpa'"
        )
    if name == "flex" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(  # findings/torch-flex-attention-odd-lengths.sh
            "attention='flex' on a CPU needs AVX-512: without it torch's kernel is wrong for some numbers of slots; use attention='sdpa'"
        )
    if name == "flash" and not new:
        raise ValueError(f"attention='flash' needs a GPU of compute capability 8.0, and {device} has less; use 'sdpa'")
    if name == "flash" and not _has_flash():
        raise ValueError(
            f"attention='flash' needs FlashAttention, which this torch is built without: {installed.FLASH}, or use 'sdpa'"
        )
    return name


def of_vit(backend: str, channels: int) -> str:
    """The backend of a ViT with so many channels per head, where the layers have `backend`. FlashAttention 4 takes half of SDPA's
    time for 72; torch's own 2 saves none."""
    flash = backend == "flash" and flash_package() == "flash_attn.cute" and channels % 8 == 0 and channels <= 256
    return "flash" if flash else "sdpa"


def _has_flash() -> bool:
    return bool(flash_package()) or torch.backends.cuda.is_flash_attention_available()


def described(backend: str) -> str:
    """A backend by what computes it."""
    if backend != "flash":
        return backend
    module = flash_package()
    return installed.titled(FLASH[module][0]) if module else "torch's FlashAttention 2"


def visible(backend: str, kv_len_B: Tensor, queries: int, slots: int, causal: bool) -> Visible:
    """Prepares a backend's mask for `queries` queries over `slots` slots."""
    if backend == "flex":
        global _flex
        _flex = _flex or torch.compile(flex_attention, dynamic=False)

        def sees(b, h, i, j):  # noqa: ANN001, ANN202  FlexAttention's own signature
            inside = j < kv_len_B[b]
            return inside & (j <= i + kv_len_B[b] - queries) if causal else inside

        rows = kv_len_B.shape[0]
        return Visible(kv_len_B, causal, create_block_mask(sees, rows, None, queries, slots, device=kv_len_B.device))
    if backend == "flash":
        return Visible(kv_len_B.int(), causal, None)
    key_S = torch.arange(slots, device=kv_len_B.device)
    last_BQ = kv_len_B[:, None] - 1
    if causal:
        last_BQ = last_BQ + torch.arange(1 - queries, 1, device=kv_len_B.device)
    return Visible(kv_len_B, causal, key_S <= last_BQ[:, None, :, None])  # [B, 1, Q or 1, S]


def within(group_BQ: Tensor, kv_len_B: Tensor) -> Visible:
    """For SDPA: each query sees the valid keys of its own group. A query that has none sees all."""
    key_Q = torch.arange(group_BQ.shape[1], device=group_BQ.device)
    valid_B1Q = (key_Q < kv_len_B[:, None])[:, None]
    mask_BQQ = (group_BQ[:, :, None] == group_BQ[:, None]) & valid_B1Q
    return Visible(kv_len_B, False, (mask_BQQ | ~mask_BQQ.any(-1, keepdim=True))[:, None])


def attend(backend: str, q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Visible) -> Tensor:
    """Attention of prepared visibility: [B, Q, H, D]. FlashAttention takes no mask, so SDPA runs where there is one."""
    if backend == "flash" and seen.mask is None:
        return _flash(q_BQHD, k_BSGD, v_BSGD, seen.kv_len_B, seen.causal)
    if backend != "flex":  # a mask may cover the first slots alone, those in use
        k_BSGD, v_BSGD = (x[:, : seen.mask.shape[-1]] for x in (k_BSGD, v_BSGD))
    q_BHQD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BQHD, k_BSGD, v_BSGD))
    grouped = q_BHQD.shape[1] != k_BGSD.shape[1]
    if backend == "flex":
        # Its decoding kernel, chosen for fewer than 128 queries, has no configuration for more than a few.
        options = {"FORCE_USE_FLEX_ATTENTION": q_BHQD.shape[2] > 1}
        return _flex(
            q_BHQD, k_BGSD, v_BGSD, block_mask=seen.mask, enable_gqa=grouped, kernel_options=options
        ).transpose(1, 2)
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BGSD, v_BGSD, seen.mask, enable_gqa=grouped)
    else:
        out_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BGSD, v_BGSD, seen.mask, enable_gqa=grouped)
    return out_BHQD.transpose(1, 2)


def attention(
    q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, kv_len_B: Tensor, causal: bool, backend: str = "sdpa"
) -> Tensor:
    """The op as the design states it: `visible` and `attend` in one. Shapes and semantics above."""
    seen = visible(backend, kv_len_B, q_BQHD.shape[1], k_BSGD.shape[1], causal)
    return attend(backend, q_BQHD, k_BSGD, v_BSGD, seen)


@functools.cache
def flash_package() -> str | None:
    """The newest FlashAttention that can be imported, which is tried, by its module's name. None leaves the kernels of 2 that
    torch brings. Warns of newer ones that are installed and broken."""
    if installed.is_there("flash_attn.cute"):
        with contextlib.suppress(Exception):  # of torch's compiler, without which it compiles in each process
            installed.kernel_folder("flash_attention")
    broken = {}
    for module, (name, function) in FLASH.items():
        why = installed.fault(module, function)
        if why is None:
            break
        if why != installed.ABSENT:
            broken[name] = why
    else:
        module = None
    instead = FLASH[module][0] if module else "torch's own kernels"
    for name, why in broken.items():
        log.warning(
            "%s is installed but cannot be imported (%s), so attention runs by %s, more slowly; %s",
            *(installed.titled(name), why, instead, mend(name)),
        )
    return module


def mend(name: str) -> str:
    """What to do about a FlashAttention that cannot be imported."""
    return installed.mend_flash() if name == "flash-attn-4" else f"build it for this torch, or pip uninstall {name}"


@functools.cache
def _one_query() -> ModuleType | None:
    """The kernel for one query a row, where Triton is there."""
    if installed.fault("triton"):
        return None
    from bagel_opt.model import one_query

    return one_query


# A custom op, so that torch.compile neither traces into the package nor breaks the graph at it.
@torch.library.custom_op("bagel_opt::flash_attention", mutates_args=())
def _flash(q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, kv_len_B: Tensor, causal: bool) -> Tensor:
    package = flash_package()
    if package not in SPLIT_KEYS and (kernel := _one_query()) and kernel.fits(q_BQHD, k_BSGD):
        return kernel.attend(q_BQHD, k_BSGD, v_BSGD, kv_len_B)
    if package == "flash_attn.cute":
        from flash_attn.cute import flash_attn_varlen_func

        # despite its name it takes padded batches; causal is aligned to the end of seqused_k
        out = flash_attn_varlen_func(q=q_BQHD, k=k_BSGD, v=v_BSGD, seqused_k=kv_len_B, causal=causal)
    elif package == "flash_attn_interface":
        from flash_attn_interface import flash_attn_with_kvcache

        out = flash_attn_with_kvcache(q_BQHD, k_BSGD, v_BSGD, cache_seqlens=kv_len_B, causal=causal)
    elif package == "flash_attn":
        from flash_attn import flash_attn_with_kvcache

        out = flash_attn_with_kvcache(q_BQHD, k_BSGD, v_BSGD, cache_seqlens=kv_len_B, causal=causal)
    else:  # rows one after another in memory, of which the kernel is told where each begins and how much of it counts
        (rows, queries), slots = q_BQHD.shape[:2], k_BSGD.shape[1]
        begin_q, begin_k = (
            torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q_BQHD.device)
            for length in (queries, slots)
        )
        packed = q_BQHD.flatten(0, 1), k_BSGD.flatten(0, 1), v_BSGD.flatten(0, 1), begin_q, begin_k, queries, slots
        out = torch.ops.aten._flash_attention_forward(*packed, 0.0, causal, False, seqused_k=kv_len_B)[0]
        out = out.unflatten(0, (rows, queries))
    return out[0] if isinstance(out, tuple) else out


@_flash.register_fake
def _(q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, kv_len_B: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q_BQHD)
