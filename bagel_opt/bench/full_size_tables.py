"""What full_size.py found, as tables."""

import statistics
from collections.abc import Iterator

from rich.table import Table

# Dense bfloat16 TFLOP/s and TB/s of memory, as NVIDIA states them, by what a device's name holds.
RATED = {"H100": (989, 3.35), "H200": (989, 4.8), "A100": (312, 2.04)}


def tables(results: dict) -> Iterator[Table]:
    """Medians, how many times faster than the official code, and where that was reckoned, what the card could do at best; and how
    near to the card's own limits."""
    names = list(results["figures"])
    others = [f"{name}, times" for name in names[1:]]
    title, floors = f"{results['device']}, torch {results['versions']['torch']}, medians", results.get("floors", {})
    floor = [f"at {results['product TFLOP/s']:.0f} TFLOP/s"] if floors else []
    shown = Table("", *names, *others, *floor, title=title)
    for row in dict.fromkeys(row for name in names for row in results["figures"][name]):
        cells = [results["figures"][name].get(row) for name in names]
        values = [statistics.median(cell) if cell else None for cell in cells]
        ratios = [f"{values[0] / value:.2f}" if values[0] and value else "" for value in values[1:]]
        at_best = [f"{floors[row]:.4g}" if row in floors else ""] if floors else []
        shown.add_row(row, *("" if value is None else f"{value:.4g}" for value in values), *ratios, *at_best)
    for name, error in results.get("velocity errors", {}).items():
        shown.add_row(f"error of a velocity, {name}", f"{error:.2e}")
    yield shown
    rated, bandwidth = next((at for name, at in RATED.items() if name in results["device"]), (None, None))
    limits = Table("one evaluation of the flow", "ms", "TFLOP/s", "of the rated", title="Against the card's limits")
    for at in results["scaling"]:
        speed = at["tflop"] / at["ms"] * 1000
        share = f"{speed / rated:.0%}" if rated else ""
        limits.add_row(f"{at['rows']} rows of {at['latents']} tokens", f"{at['ms']:.1f}", f"{speed:.0f}", share)
    token = statistics.median(results["figures"]["ours"]["token, ms"])
    read = results["bytes per token"] / token / 1e9  # TB/s
    limits.add_row("a token, by its weights", f"{token:.2f}", "", f"{read / bandwidth:.0%}" if bandwidth else "")
    yield limits
    if "memory" in results:
        columns = dict.fromkeys(name for row in results["memory"] for name in row)
        capped = Table(*columns, title="Under caps of memory")
        for row in results["memory"]:
            capped.add_row(*(_cell(row.get(name, "")) for name in columns))
        yield capped
    if "adapters" in results:
        kept = Table("", "", title="Adapters that stay apart, of rank 64")
        for name, value in results["adapters"].items():
            kept.add_row(name, f"{value:.4g}")
        yield kept


def _cell(value: float | str | bool) -> str:
    return f"{value:.4g}" if type(value) is float else "yes" if value is True else "no" if value is False else value
