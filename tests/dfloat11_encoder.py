"""A group of DFloat11, as its paper (arXiv 2504.11651) and the package's decoder have the layout: for tests of ours."""

import heapq
import itertools

import numpy as np
import torch

THREADS, BITS = 512, 64  # of a block; that a thread reads
END = -1  # what the last byte is filled up with the beginning of


def compress(weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one group."""
    bits = torch.cat([weight.flatten() for weight in weights]).view(torch.int16).numpy().view(np.uint16)
    exponents = (bits >> 7 & 255).astype(np.uint8)
    found, counts = np.unique(exponents, return_counts=True)
    codes = _codes({**dict(zip(found.tolist(), counts.tolist(), strict=True)), END: 1})
    tables = {
        "encoded_exponent": _encode(exponents, codes),
        "sign_mantissa": (bits >> 8 & 128 | bits & 127).astype(np.uint8),
        "luts": _luts(codes),
    }
    starts, end = _starts(exponents, codes)
    starts = starts if end % 8 == 0 else np.append(starts, end)  # the filling is a code too
    threads = THREADS * -(-len(tables["encoded_exponent"]) // (THREADS * BITS // 8))
    first = np.searchsorted(starts, np.arange(threads) * BITS)
    gaps = np.zeros(threads, np.int64)
    some = first < len(starts)
    gaps[some] = starts[first[some]] - np.flatnonzero(some) * BITS
    tables["gaps"] = np.packbits(gaps[:, None] >> np.arange(4, -1, -1) & 1)
    positions = np.append(np.minimum(first[::THREADS], len(bits)), len(bits))
    tables["output_positions"] = positions.astype(np.uint32).view(np.uint8)
    tables["split_positions"] = np.cumsum([weight.numel() for weight in weights])[:-1]
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def _codes(counts: dict[int, int]) -> dict[int, str]:
    """Huffman's code."""
    order = itertools.count()
    heap = [(count, next(order), {symbol: ""}) for symbol, count in counts.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (less, _, zero), (more, _, one) = heapq.heappop(heap), heapq.heappop(heap)
        joined = {s: f"0{code}" for s, code in zero.items()} | {s: f"1{code}" for s, code in one.items()}
        heapq.heappush(heap, (less + more, next(order), joined))
    return heap[0][2]


def _starts(exponents: np.ndarray, codes: dict[int, str]) -> tuple[np.ndarray, int]:
    """The bit at which each code begins, and the one after the last."""
    lengths = np.zeros(256, np.int64)
    for symbol, code in codes.items():
        if symbol != END:
            lengths[symbol] = len(code)
    ends = np.cumsum(lengths[exponents])
    return ends - lengths[exponents], int(ends[-1])


def _encode(exponents: np.ndarray, codes: dict[int, str]) -> np.ndarray:
    starts, end = _starts(exponents, codes)
    stream = np.zeros(-(-end // 8) * 8, np.uint8)
    for symbol, code in codes.items():
        if symbol != END:
            for place, bit in enumerate(code):
                stream[starts[exponents == symbol] + place] = int(bit)
    filling = codes[END][: len(stream) - end]
    stream[end : end + len(filling)] = [int(bit) for bit in filling]
    return np.packbits(stream)


def _luts(codes: dict[int, str]) -> np.ndarray:
    """A table for the first byte of a code, one for each beginning of whole bytes that a longer code has, and the codes'
    lengths. Where the end's code would be, the package repeats what stands before it."""
    beginnings = sorted({code[:size] for code in codes.values() for size in range(0, len(code), 8)}, key=len)
    luts = np.zeros((len(beginnings) + 1, 256), np.uint8)
    filled = np.zeros(luts.shape, bool)
    filled[-1] = True
    for symbol, code in codes.items():
        if symbol == END:
            continue
        luts[-1, symbol] = len(code)
        for size in range(0, len(code), 8):
            byte, table = code[size : size + 8], beginnings.index(code[:size])
            if size + 8 < len(code):
                places, value = int(byte, 2), 256 - beginnings.index(code[: size + 8])
            else:
                first = int(byte.ljust(8, "0"), 2)
                places, value = slice(first, first + 2 ** (8 - len(byte))), symbol
            luts[table, places], filled[table, places] = value, True
    for place in range(1, luts.size):
        if not filled.flat[place]:
            luts.flat[place] = luts.flat[place - 1]
    return luts
