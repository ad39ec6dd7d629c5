"""Decoding DFloat11 to bfloat16, bit for bit, on the host (Zhang et al., arXiv 2504.11651; github.com/LeanModels/DFloat11).

A group is the weights of one module, or of several, one after the other. Each number's sign and mantissa lie in a byte
of their own, its exponent in a Huffman code. Codes follow each other, the highest bit first, through the whole group;
so that many threads can read them, the format says where they begin: `gaps`, 5 bits for each thread's bytes, says how many
bits there belong to the code before; `output_positions` says for each block of threads which number it begins with.
Here each block is a lane of NumPy arrays, and all lanes decode their next codes together.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import CheckpointError
from bagel_opt.files.weights import Location

PIECES = ("encoded_exponent", "sign_mantissa", "luts", "output_positions", "gaps")
SPLITS = "split_positions"  # where in a group each weight but the first begins; not there in a group of one
POINTERS = 240  # from here on an entry of a table is no exponent: 256 - entry is the table for the code's next byte
WIDTH = 8  # bytes that a thread reads; the package's kernel knows no other
LANES = 4096  # blocks at once: 50 MB of exponents. Fewer take longer, more do not take less
WINDOW = 16  # bits that are looked up at once
AT_ONCE = 8  # exponents that one look-up may give
Stored = Mapping[str, tuple[Path, Location]]


@dataclass(frozen=True)
class Part:
    """One weight in a group: its numbers from start on, up to stop."""

    group: "Group"
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.group.pieces["encoded_exponent"][0]

    @property
    def location(self) -> Location:
        """Its length is its share of the group's bytes, its shape one dimension: groups do not say more."""
        count = self.stop - self.start
        return Location(0, self.group.size * count // max(1, self.group.count), DTYPES["bfloat16"], (count,))

    def read(self) -> torch.Tensor:
        """Decoded, in one dimension."""
        return torch.from_numpy(self.group.decode(self.start, self.stop).view(np.int16)).view(torch.bfloat16)


class Group:
    """Weights that were compressed together. Reads its tables alone.

    pieces: of each piece its file and its place there. threads: of a block. Raises CheckpointError.
    """

    def __init__(self, name: str, pieces: Stored, threads: int):
        self.name, self.pieces, self.threads, self.block = name, pieces, threads, threads * WIDTH
        if lacks := [piece for piece in PIECES if piece not in pieces]:
            held = next(iter(pieces.values()))[0]
            raise CheckpointError(f"{held}: the DFloat11 group {name:.200} lacks {', '.join(lacks)}")
        sizes = {piece: pieces[piece][1].length for piece in PIECES}
        self.size, self.count = sum(sizes.values()), sizes["sign_mantissa"]  # of bytes; of numbers
        blocks = -(-sizes["encoded_exponent"] // self.block)
        self._check(blocks > 0, "its encoded_exponent is empty")
        want = {"output_positions": 4 * (blocks + 1), "gaps": blocks * threads * 5 // 8}
        for piece, size in want.items():
            self._check(sizes[piece] == size, f"its {piece} have {sizes[piece]} bytes, not {size} for {blocks} blocks")
        rows, rest = divmod(sizes["luts"], 256)
        self._check(not rest and rows >= 2, f"its luts have {sizes['luts']} bytes")
        self._check(rows <= 2 + 256 - POINTERS, f"it has {rows - 1} tables, of which its pointers can name 17")
        self.luts = self._read("luts").reshape(rows, 256)
        self._check(
            not self.luts[-1, POINTERS:].any(), f"it has exponents from {POINTERS} on, which its tables cannot hold"
        )
        pointers = self.luts[:-1][self.luts[:-1] >= POINTERS]
        self._check((256 - pointers.astype(int) < rows - 1).all(), "its luts point beyond themselves")
        positions = self._read("output_positions").view("<u4").astype(np.int64)
        counts = np.diff(positions)
        right = (
            positions[0] == 0 and positions[-1] == self.count and counts.min() >= 0 and counts.max() <= 8 * self.block
        )
        self._check(right, f"its output_positions do not lead from 0 to its {self.count} numbers")
        self.positions = positions

    def parts(self, names: list[str]) -> dict[str, Part]:
        """The weights of those names in it."""
        splits = []
        if SPLITS in self.pieces:
            self._check(self.pieces[SPLITS][1].dtype.name == "int64", f"its {SPLITS} are no int64")
            splits = self._read(SPLITS).view("<i8").tolist()
        bounds = [0, *splits, self.count]
        self._check(len(names) == len(bounds) - 1, f"it has {len(bounds) - 1} parts, and its pattern {len(names)}")
        self._check(bounds == sorted(bounds), f"its {SPLITS} do not rise up to its {self.count} numbers")
        return {name: Part(self, *bounds[i : i + 2]) for i, name in enumerate(names)}

    def decode(self, start: int, stop: int) -> np.ndarray:
        """Its numbers from start up to stop, as the bits of bfloat16 in uint16."""
        found = np.empty(stop - start, np.uint16)
        first, last = np.searchsorted(self.positions, [start, stop - 1], "right") - 1
        for begin in range(first, last + 1 if stop > start else first, LANES):
            end = min(begin + LANES, last + 1)
            at, to = max(start, self.positions[begin]), min(stop, self.positions[end])
            exponents = self._exponents(begin, end)[at - self.positions[begin] : to - self.positions[begin]]
            rest = self._read("sign_mantissa", at, to)
            bits = found[at - start : to - start]
            np.left_shift(exponents, 7, out=bits, dtype=np.uint16)
            bits |= rest & 0x7F
            bits |= (rest & 0x80).astype(np.uint16) << 8
        return found

    def _exponents(self, begin: int, end: int) -> np.ndarray:
        """Of the blocks from begin up to end."""
        words, steps = self._tables
        stream = self._stream(begin, end)
        counts = np.diff(self.positions[begin : end + 1])
        most = int(counts.max()) + AT_ONCE
        rows = np.zeros((len(counts), most + AT_ONCE), np.uint8)
        anywhere = np.ndarray(rows.size - AT_ONCE + 1, "<i8", rows, strides=(1,))  # eight exponents from any place on
        lines = np.arange(len(counts)) * rows.shape[1]
        # What a lane has done, in one number: exponents in the upper half, bits read in the lower.
        done = (np.arange(len(counts)) * self.block * 8) + self._gaps(begin, end)
        turn = 0
        while turn % 16 or (done >> 32 < counts + AT_ONCE).any():
            turn += 1
            bit = done & 0xFFFFFFFF
            windows = stream.take(bit >> 5, mode="clip")
            windows >>= 64 - WINDOW - (bit & 31)
            windows &= (1 << WINDOW) - 1
            places = np.minimum(done >> 32, most) + lines
            anywhere[places] = words.take(windows)
            step = steps.take(windows)
            if not step.all():
                longer = np.flatnonzero(step == 0)
                exponents, lengths = self._long(stream, bit[longer])
                past = done[longer] >> 32 >= counts[longer]  # the end of its own numbers
                self._check((past | (lengths > 0)).all(), "it has a code that its luts do not have")
                anywhere[places[longer]] = exponents
                step[longer] = np.maximum(lengths, 1) + (1 << 32)
            done += step
        self._check_ends(begin, rows, counts)
        return np.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])

    def _check_ends(self, begin: int, rows: np.ndarray, counts: np.ndarray) -> None:
        """What a lane reads past its end is what the next one reads first."""
        for i in np.flatnonzero(counts[1:] >= AT_ONCE):
            after = rows[i, counts[i] : counts[i] + AT_ONCE]
            self._check(
                np.array_equal(after, rows[i + 1, :AT_ONCE]), f"its block {begin + i} ends within the next one's"
            )

    def _stream(self, begin: int, end: int) -> np.ndarray:
        """The blocks' codes: for each 32 bits these and the next 32, as int64."""
        data = self._read("encoded_exponent", begin * self.block, end * self.block + 8)
        padded = np.zeros((end - begin) * self.block + 8, np.uint8)
        padded[: len(data)] = data
        halves = padded.view(">u4").astype(np.int64)
        return (halves[:-1] << 32) | halves[1:]

    def _gaps(self, begin: int, end: int) -> np.ndarray:
        """Bits at each block's start that belong to a code of the one before."""
        bits = np.arange(begin, end) * self.threads * 5
        packed = self._read("gaps", bits[0] // 8, bits[-1] // 8 + 2).astype(np.int64)
        at = bits // 8 - bits[0] // 8
        return (((packed[at] << 8) | np.append(packed, 0)[at + 1]) >> (11 - bits % 8)) & 31

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """By the next 16 bits: the exponents whose codes lie in these, the first in the lowest byte; and how many they are
        in the upper half of a number, and their bits in its lower; 0 where the first code is longer."""
        window = np.arange(1 << WINDOW)
        tables, lengths = self.luts[:-1].astype(np.int64), self.luts[-1].astype(np.int64)
        symbols = tables[0, window >> 8]
        symbols = np.where(symbols < POINTERS, symbols, tables[(256 - symbols) % len(tables), window & 255])
        taken = np.where(symbols < POINTERS, lengths[symbols], WINDOW + 1)
        # Where no number's code is, but that of the end, tables hold anything. It must not be found in a window that is
        # filled up with zeros: what is found has to depend on its own bits alone.
        for length in range(1, WINDOW + 1):
            alike = symbols.reshape(1 << length, -1)
            unsure = (taken.reshape(alike.shape) == length) & (alike != alike[:, :1]).any(1, keepdims=True)
            taken[unsure.reshape(-1)] = WINDOW + 1
        words, steps, used = (np.zeros(1 << WINDOW, np.int64) for _ in range(3))
        fits = np.ones(1 << WINDOW, bool)
        for place in range(AT_ONCE):
            rest = (window << used) & ((1 << WINDOW) - 1)
            fits &= (used + taken[rest] <= WINDOW) & (taken[rest] > 0)
            words |= np.where(fits, symbols[rest] << (8 * place), 0)
            used += np.where(fits, taken[rest], 0)
            steps += np.where(fits, (1 << 32) + taken[rest], 0)
        return words, steps

    def _long(self, stream: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The exponents whose codes begin at those bits, and the codes' lengths, up to 32: table after table. 0 for none."""
        window = stream.take(bits >> 5, mode="clip") >> (32 - (bits & 31))
        symbols = np.zeros(len(bits), np.int64)
        for depth in range(4):
            table = 256 - symbols if depth else symbols
            here = (symbols >= POINTERS) if depth else np.ones(len(bits), bool)
            symbols = np.where(here, self.luts[table % len(self.luts), (window >> (24 - 8 * depth)) & 255], symbols)
        return symbols, self.luts[-1].astype(np.int64)[symbols]

    def _read(self, piece: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes of a piece, from start up to stop or its end."""
        path, at = self.pieces[piece]
        stop = at.length if stop is None else min(int(stop), at.length)
        return np.fromfile(path, np.uint8, max(0, stop - int(start)), offset=at.offset + int(start))

    def _check(self, right: bool, what: str) -> None:
        if not right:
            raise CheckpointError(f"{self.pieces['luts'][0]}: the DFloat11 group {self.name:.200} is not whole: {what}")


def find_parts(tensors: Stored, config: Any, where: Path) -> dict[str, Part]:
    """The weights that lie in groups, by their names. tensors: all of a checkpoint; config: its `dfloat11_config`, and where
    that was looked for. Raises CheckpointError."""
    groups: dict[str, dict[str, tuple[Path, Location]]] = {}
    for name, stored in tensors.items():
        if piece := piece_of(name):
            groups.setdefault(name.removesuffix(f".{piece}"), {})[piece] = stored
    if not groups:
        return {}
    match config:
        case {"threads_per_block": [int(threads)], "bytes_per_thread": int(width), "pattern_dict": dict(patterns)}:
            right = width == WIDTH and 0 < threads <= 1024 and threads % 8 == 0
        case _:
            right = False
    if not right:
        raise CheckpointError(
            f"{where} lacks dfloat11_config, or what it must say of {len(groups)} DFloat11 groups (threads_per_block, "
            f"bytes_per_thread {WIDTH}, pattern_dict); copy it again from where the weights are from"
        )
    return dict(_parts(groups, threads, patterns, where))


def piece_of(name: str) -> str | None:
    """Which piece of a group a tensor is, by its name."""
    last = name.rpartition(".")[2]
    return last if last in (*PIECES, SPLITS) else None


def _parts(groups: dict[str, Stored], threads: int, patterns: dict, where: Path) -> Iterator[tuple[str, Part]]:
    for name, pieces in groups.items():
        paths = next((paths for pattern, paths in patterns.items() if _matches(pattern, name, where)), [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise CheckpointError(f"{where}: pattern_dict has {paths!r:.200}, which is no list of names")
        names = [f"{name}.{path}.weight" for path in paths] or [f"{name}.weight"]
        yield from Group(name, pieces, threads).parts(names).items()


def _matches(pattern: str, name: str, where: Path) -> bool:
    """Patterns that could take forever count as none."""
    try:
        if len(re.findall(r"[*+?{]", pattern)) <= 3 and not re.search(r"[)*+?}][*+{]", pattern):
            return re.fullmatch(pattern, name) is not None
    except re.error:
        pass
    raise CheckpointError(f"{where}: pattern_dict has {pattern!r:.200}, which is no simple pattern of names")
