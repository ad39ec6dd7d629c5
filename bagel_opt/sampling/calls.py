"""Which rows of a batch a program computes together, where they have different lengths."""

from collections.abc import Sequence

# What a call of a program costs besides computing: as operations that two cores of a CPU could have done meanwhile, and
# for reading the weights as tokens, of which a CPU computes 20 in that time and a GPU some hundreds.
CALL, READ = 1.5e9, 100
Part = tuple[slice, int]  # rows, and the latents that each of them gets


def parts(rows: Sequence[int], sizes: Sequence[int], every: int, free: bool, token: float) -> list[Part]:
    """Calls at the least cost for ascending rows of a batch that has `every` rows. sizes: latents that each row needs. free: whether
    a call may be for any neighbours, and not only for one row or all. token: operations for one."""
    if free:
        return _of_neighbours(rows, sizes, token)
    alone = [(slice(row, row + 1), size) for row, size in zip(rows, sizes, strict=True)]
    whole = (slice(0, every), max(sizes))
    if _cost(every, whole[1], token) < sum(_cost(1, size, token) for size in sizes):
        return [whole]
    return alone


def _cost(rows: int, size: int, token: float) -> float:
    return CALL + token * (READ + rows * (size + 2))  # with an image's markers


def _of_neighbours(rows: Sequence[int], sizes: Sequence[int], token: float) -> list[Part]:
    best: list[tuple[float, list[Part]]] = [(0.0, [])]  # of the first rows, by their number
    for end in range(1, len(rows) + 1):
        found, size = [], 0
        for start in range(end - 1, -1, -1):
            if rows[end - 1] - rows[start] != end - 1 - start:  # no neighbours
                break
            size = max(size, sizes[start])
            cost, before = best[start]
            part = slice(rows[start], rows[end - 1] + 1), size
            found.append((cost + _cost(end - start, size, token), [*before, part]))
        best.append(min(found, key=lambda one: one[0]))
    return best[-1][1]


def neighbours(rows: Sequence[int]) -> list[slice]:
    """Ascending rows as slices of neighbours."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row + 1 for row in rows if row + 1 not in rows]
    return [slice(*bounds) for bounds in zip(starts, ends, strict=True)]
