"""Who computes what, where a model has several ranks: each has all weights and caches, and runs every program alike but those
whose work is shared out.

A flow evaluation is shared out by rows (`guidance`: a request's branches are rows, and so are several pictures) and by the
latents of each row (`sequence`): with g * s ranks, rank r has the rows of part r // s and the latents of part r % s. Decoding
is shared out by weights (`tensor`).
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bagel_opt.errors import BundleError
from bagel_opt.files.adapters import Named
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import as_slice
from bagel_opt.programs.signatures import ROW
from bagel_opt.runtime.groups import Group, Groups
from bagel_opt.runtime.split_layers import SplitGenerate
from bagel_opt.runtime.split_weights import SplitDecode, undivided
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_bundle import PackagedRuntime

Parallel = str | Mapping[str, int]
WAYS = ("guidance", "sequence", "tensor")


@dataclass(frozen=True)
class Shares:
    """What is shared out over ranks. guidance, sequence: parts of a flow evaluation's rows, and of its latents; 0 and 0 go by the
    rows at hand. tensor: whether decoding is; None where that can be and pays."""

    ranks: int
    guidance: int = 0
    sequence: int = 0
    tensor: bool | None = None

    @classmethod
    def read(cls, parallel: Parallel, gpus: int) -> "Shares":
        """Raises ValueError."""
        if parallel == "auto":
            return cls(gpus)
        if isinstance(parallel, str) and parallel in WAYS:
            return cls.read({parallel: gpus}, gpus)
        if not isinstance(parallel, Mapping) or not parallel or not parallel.keys() <= set(WAYS):
            raise ValueError(
                f"parallel={parallel!r}; allowed are 'auto', {', '.join(map(repr, WAYS))}, or ranks of each, such as "
                "{'guidance': 2, 'sequence': 2}"
            )
        sizes = [parallel.get(way, 1) for way in WAYS]
        guidance, sequence, tensor = sizes
        alone = parallel.keys() == {"tensor"}  # flow evaluations are not shared out, then
        if any(type(size) is not int or size < 1 for size in sizes) or (guidance * sequence != gpus and not alone):
            raise ValueError(f"parallel={dict(parallel)!r} must multiply to gpus={gpus}")
        if tensor not in (1, gpus) or (alone and tensor != gpus):
            raise ValueError(f"parallel={dict(parallel)!r}: tensor is for all gpus={gpus} or none")
        return cls(gpus, guidance, sequence, tensor > 1)

    def of(self, rows: int) -> tuple[int, int]:
        """Parts of the rows and of the latents, for so many rows. A single row is not shared out by rows: each part then
        computes it."""
        if not self.guidance:
            parts = math.gcd(rows, self.ranks)
            return parts, self.ranks // parts
        return (1 if rows == 1 else self.guidance), self.sequence

    def sequences(self) -> list[int]:
        """All that the second may be, but 1."""
        if self.guidance:
            return [self.sequence] if self.sequence > 1 else []
        return [size for size in range(2, self.ranks + 1) if self.ranks % size == 0]


@dataclass
class Part:
    """A rank's part of a tensor [rows, latents, ...], which the group gathers where somebody looks at it: [chunk, T, ...]."""

    tensor: Tensor
    group: Group
    rows: int
    latents: int
    row_parts: int

    def whole(self) -> Tensor:
        """On all ranks, which must ask together."""
        chunk, length, *shape = self.tensor.shape
        parts = self.group.gather(self.tensor).view(self.row_parts, -1, chunk, length, *shape)
        rows = parts.transpose(1, 2).reshape(self.row_parts * chunk, -1, *shape)
        return rows[: self.rows, : self.latents]


class RankRuntime:
    """What a rank does with each call of the runtime interface (programs/interface.py)."""

    def __init__(self, inner: TorchRuntime, groups: Groups, shares: Shares):
        """Raises BundleError for one whose programs' layers cannot be taken apart."""
        self.inner, self.groups, self.shares = inner, groups, shares
        if not isinstance(inner, PackagedRuntime):
            run, compiles = inner.programs["generate"].run, inner.backend == "compile"
            for size in shares.sequences():
                self._add(_split(size), "generate", SplitGenerate(inner.model, groups.part[size], compiles, run))
            if shares.tensor:
                self._add(BY_WEIGHTS, "decode", SplitDecode(inner.model, groups.world, compiles, run))

    def _add(self, name: str, like: str, program: Any) -> None:
        """A program, captured as the one that it stands in for."""
        self.inner.programs[name] = program
        if not (self.inner.plan and self.inner.plan.streams_in(like)):
            self.inner.graphed.add(name)

    def for_profile(self, profile: Profile) -> "RankRuntime":
        other = copy.copy(self)
        other.inner = self.inner.for_profile(profile)
        return other

    def set_adapters(self, adapters: Named) -> None:
        try:
            self.inner.set_adapters(adapters)
        finally:
            if self.shares.tensor:
                self.inner.programs[BY_WEIGHTS].forget()

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        return self.inner.caches(rows, slots)

    def give_back(self, caches: list[Tensor]) -> None:
        self.inner.give_back(caches)

    def zeros(self, shape: tuple[int, ...], hidden: bool) -> Tensor:
        return self.inner.zeros(shape, hidden)

    def write_row(self, tensor: Tensor, row: int, values: Any) -> None:
        self.inner.write_row(tensor, row, values)

    def clear_row(self, caches: list[Tensor], row: int) -> None:
        self.inner.clear_row(caches, row)

    def copy_row(self, source: list[Tensor], row: int, target: list[Tensor], to: int, length: int) -> None:
        self.inner.copy_row(source, row, target, to, length)

    def first_ranks(self, ids_B: Tensor) -> Tensor:
        """What the first rank chose, for "decode" on all: 16 bits may have put another one first elsewhere."""
        return self.groups.world.gather(ids_B)[0].clamp(min=0)  # where there is none, any

    def gather_seconds(self, size: int, times: int = 100) -> float:
        """How long it takes to gather so many bytes of every rank, one time after another, as within a program."""
        x = torch.zeros(size, dtype=torch.uint8, device=self.inner.device)

        def gather() -> None:
            for _ in range(times):
                self.groups.world.gather(x)

        gather()
        if x.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                gather()
            gather = graph.replay
            gather()
            torch.cuda.synchronize(x.device)
        begun = time.perf_counter()
        gather()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return (time.perf_counter() - begun) / times

    def run(self, program: str, inputs: list, caches: list[Tensor], rows: int | slice | None) -> tuple:
        if program in GENERATE:
            return self._generate(program, inputs, caches, rows)
        return self.inner.run(BY_WEIGHTS if self._by_weights(program) else program, inputs, caches, rows)

    def rehearse(self, program: str, inputs: list, caches: list[Tensor], rows: int | slice | None) -> None:
        """Runs it without the others: where memory is full, nobody waits, and what has to be compiled is. What it writes to the
        caches the program itself writes over. Raises MemoryError."""
        try:
            self._rehearse(program, inputs, caches, rows)
        except MemoryError:
            self.inner.free_memory()
            self._rehearse(program, inputs, caches, rows)

    def _rehearse(self, program: str, inputs: list, caches: list[Tensor], rows: int | slice | None) -> None:
        graphs, self.inner.graphs = self.inner.graphs, None  # a graph is captured after a run with the others
        try:
            with self.groups.rehearsal():
                for result in self.run(program, inputs, caches, rows):
                    if isinstance(result, Part):
                        result.whole()
        finally:
            self.inner.graphs = graphs

    def exchanging(self, program: str) -> bool:
        """Whether ranks wait for each other in it."""
        return program in GENERATE or self._by_weights(program)

    def _by_weights(self, program: str) -> bool:
        """Adapters are beside whole weights."""
        return bool(self.shares.tensor) and program in DECODE and not self.inner.adapters

    def _generate(self, program: str, inputs: list, caches: list[Tensor], rows: int | slice | None) -> tuple:
        """-> the velocity, whole; the last layer's output, as a Part where it is shared out"""
        count, latents = inputs[0].shape[:2]
        parts, sequence = self.shares.of(count)
        if parts == sequence == 1:
            return self.inner.run(program, inputs, caches, rows)
        chunk, start = -(-count // parts), as_slice(rows).start or 0
        first = (self.groups.rank // sequence) * chunk if parts > 1 else 0
        mine = slice(min(first, count), min(first + chunk, count))
        found = self._rows(program, inputs, caches, start, mine, sequence)
        group = self.groups.world if parts > 1 else self.groups.part[sequence]
        velocity, hidden = (Part(filled(x, chunk), group, count, latents, parts) for x in found)
        return velocity.whole(), hidden

    def _rows(self, program: str, inputs: list, caches: list, start: int, mine: slice, sequence: int) -> tuple:
        """The evaluation of some of the rows, of which the first is row `start` of the caches."""
        first, last = mine.start, mine.stop
        if first == last:  # fewer rows than parts
            length, llm = -(-inputs[0].shape[1] // sequence), self.inner.config.llm
            nothing = self.inner.zeros((0, length, self.inner.config.latent_dim))
            return nothing, self.inner.zeros((0, length, llm.hidden_size), hidden=True)
        if sequence > 1:
            program = _split(sequence)
        elif isinstance(self.inner, PackagedRuntime) and last - first < len(inputs[0]):  # made for all rows or for one
            name = program.removesuffix(ROW) + ROW
            each = [
                self.inner.run(name, [x[row : row + 1] for x in inputs], caches, start + row)
                for row in range(first, last)
            ]
            return tuple(torch.cat(found) for found in zip(*each, strict=True))
        return self.inner.run(program, [x[mine] for x in inputs], caches, slice(start + first, start + last))


GENERATE, DECODE = ({name, name + ROW} for name in ("generate", "decode"))
BY_WEIGHTS = "decode, by weights"


def _split(size: int) -> str:
    return f"generate, in {size} parts"


def filled(x: Tensor, rows: int) -> Tensor:
    """With zeros after it, where it has fewer rows."""
    return x if len(x) == rows else torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))


def shares_for(inner: TorchRuntime, parallel: Parallel, ranks: int) -> Shares:
    """What of a runtime's work is shared out. Raises ValueError, and BundleError for a bundle whose compiled layers
    cannot be taken apart."""
    shares = Shares.read(parallel, ranks)
    if not isinstance(inner, PackagedRuntime):
        why = undivided(inner.model, ranks)
        if shares.tensor and why:
            raise ValueError(f"parallel={parallel!r}: {why}; use 'guidance' or 'sequence'")
        # launched one by one, gathering takes longer than a part of the weights saves
        streams = inner.plan and inner.plan.streams_in("decode")
        pays = inner.device.type == "cpu" or (inner.graphs is not None and not streams)
        return replace(shares, tensor=not why and pays) if shares.tensor is None else shares
    if shares.sequence > 1 or shares.tensor:
        raise BundleError(
            f"parallel={parallel!r} takes layers apart, and a bundle of kind {inner.manifest.kind!r} has them compiled whole; use "
            "parallel='guidance', or load the checkpoint"
        )
    return Shares(ranks, ranks, 1, False)
