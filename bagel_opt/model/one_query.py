"""Attention of one query a row on a GPU, in Triton (https://triton-lang.org): the keys of a row are split among multiprocessors, as
in Flash-Decoding (https://pytorch.org/blog/flash-decoding/). What a row gives depends on its own keys and on how many rows there
are, not on what the others hold.

B rows, S slots, H query heads, G key-value heads, D channels per head, P splits.
"""
# ruff: noqa: ANN001, ANN202  Triton's kernels take pointers and numbers

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys at a time
# Splits: so many that there are PROGRAMS of them, on an H200 the best of 8 to 64 splits from 1 row to 16 and 200 keys to 14,000.
PROGRAMS, MOST = 512, 32


def fits(q_BQHD: Tensor, k_BSGD: Tensor) -> bool:
    """Whether the kernel is for such queries and keys."""
    heads, channels = q_BQHD.shape[2:]
    return q_BQHD.shape[1] == 1 and channels in (16, 32, 64, 128, 256) and heads // k_BSGD.shape[2] <= 64


def attend(q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, kv_len_B: Tensor) -> Tensor:
    """Attention of a row's query to its first kv_len keys, zeros where it has none: [B, 1, H, D]. Keys and values may be rows
    of larger ones, with the same strides."""
    (rows, _, heads, channels), kv_heads = q_BQHD.shape, k_BSGD.shape[2]
    splits = min(MOST, max(1, triton.next_power_of_2(PROGRAMS // (rows * kv_heads))))
    q_BQHD, out_BQHD = q_BQHD.contiguous(), torch.empty_like(q_BQHD, memory_format=torch.contiguous_format)
    sum_BHPD = torch.empty(rows, heads, splits, channels, dtype=torch.float32, device=q_BQHD.device)
    about_BHP2 = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=q_BQHD.device)
    scale, group = math.log2(math.e) / math.sqrt(channels), heads // kv_heads
    given = q_BQHD, k_BSGD, v_BSGD, kv_len_B, sum_BHPD, about_BHP2, *k_BSGD.stride()[:3], heads, kv_heads, scale
    sizes = {
        "GROUP": group,
        "M": max(16, triton.next_power_of_2(group)),
        "D": channels,
        "SPLITS": splits,
        "BLOCK": BLOCK,
    }
    _split_kernel[(rows * kv_heads, splits)](*given, **sizes, num_warps=4, num_stages=2)
    given = sum_BHPD, about_BHP2, kv_len_B, out_BQHD, heads
    _join_kernel[(rows * heads,)](*given, D=channels, SPLITS=splits, BLOCK=BLOCK, num_warps=4)
    return out_BQHD


@triton.jit
def _each(n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a split."""
    return tl.cdiv(tl.cdiv(n, SPLITS), BLOCK) * BLOCK


@triton.jit
def _split_kernel(
    q, k, v, kv_len, sums, about, row, slot, head, heads, kv_heads, scale,
    GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of a row's keys, for the queries of the heads that share them. about: of each query the largest score, times
    log2(e), and the sum of weights relative to it."""
    b, g, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    n = tl.load(kv_len + b)
    each = _each(n, SPLITS, BLOCK)
    first = split * each
    if first < n:
        last = tl.minimum(first + each, n)
        m, d = tl.arange(0, M), tl.arange(0, D)
        mine = b * heads + g * GROUP + m
        x = tl.load(q + mine[:, None] * D + d[None], mask=(m < GROUP)[:, None], other=0.0)
        best, weight = tl.full((M,), -1e30, tl.float32), tl.zeros((M,), tl.float32)
        sum = tl.zeros((M, D), tl.float32)
        base = b.to(tl.int64) * row + g * head
        for start in range(first, last, BLOCK):
            key = start + tl.arange(0, BLOCK)
            at = base + key.to(tl.int64) * slot
            keys = tl.load(k + at[None] + d[:, None], mask=(key < last)[None], other=0.0)
            score = tl.where((key < last)[None], tl.dot(x, keys) * scale, float("-inf"))
            top = tl.maximum(best, tl.max(score, axis=1))
            p, fades = tl.exp2(score - top[:, None]), tl.exp2(best - top)
            values = tl.load(v + at[:, None] + d[None], mask=(key < last)[:, None], other=0.0)
            sum = tl.dot(p.to(values.dtype), values, sum * fades[:, None])
            weight, best = weight * fades + tl.sum(p, axis=1), top
        at = mine * SPLITS + split
        tl.store(sums + at[:, None] * D + d[None], sum, mask=(m < GROUP)[:, None])
        tl.store(about + at * 2, best, mask=m < GROUP)
        tl.store(about + at * 2 + 1, weight, mask=m < GROUP)


@triton.jit
def _join_kernel(sums, about, kv_len, out, heads, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """A query's splits, of those that have keys."""
    query, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    n = tl.load(kv_len + query // heads)
    there = split * _each(n, SPLITS, BLOCK) < n
    at = query * SPLITS + split
    best = tl.load(about + at * 2, mask=there, other=-1e30)
    share = tl.exp2(best - tl.max(best, axis=0)) * there.to(tl.float32)
    whole = tl.sum(share * tl.load(about + at * 2 + 1, mask=there, other=0.0), axis=0)
    x = tl.load(sums + at[:, None] * D + d[None], mask=there[:, None], other=0.0)
    y = tl.sum(x * share[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + query * D + d, y.to(out.dtype.element_ty))
