"""Charts of a full-size benchmark: python -m bagel_opt.bench.charts RESULTS.json --out FOLDER   (needs matplotlib)"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bagel_opt.files.replacing import replacing

OFFICIAL, OURS, FLOOR = "#9aa0a6", "#1a73e8", "#d93025"
# figure -> (what the axis says, the factor to what it shows)
BARS = {
    "1024x1024: denoising, s": ("1024x1024\nseconds", 1),
    "768x1024: denoising, s": ("768x1024\nseconds", 1),
    "512x512: denoising, s": ("512x512\nseconds", 1),
    "edit 1024x1024, 8 steps: denoising, s": ("edit step\nx 100 ms", 10 / 8),
    "token, ms": ("token\nms", 1),
}


def bars(results: dict, out: Path) -> None:
    """Medians of the official code and of ours, with how many times faster ours is."""
    axes = _axes(1, (8, 3.2))[0]
    for i, (name, (_, factor)) in enumerate(BARS.items()):
        theirs, ours = (factor * statistics.median(results["figures"][who][name]) for who in ("official", "ours"))
        axes.bar(i - 0.2, theirs, 0.38, color=OFFICIAL, label="official code" if i == 0 else None)
        axes.bar(i + 0.2, ours, 0.38, color=OURS, label="bagel_opt" if i == 0 else None)
        axes.annotate(f"{theirs:.3g}", (i - 0.2, theirs), ha="center", va="bottom", fontsize=8)
        axes.annotate(f"{ours:.3g}\n({theirs / ours:.1f}x)", (i + 0.2, ours), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(BARS)), [label for label, _ in BARS.values()])
    axes.margins(y=0.15)
    axes.set_title(f"{results['device']}, bfloat16, random weights, {results['date']}: less is better", fontsize=10)
    axes.legend(frameon=False)
    _save(axes, out)


def scaling(results: dict, rated: float, out: Path) -> None:
    """Time of one evaluation of the flow against latent tokens and against rows, with the floor at `rated` TFLOP/s."""
    left, right = _axes(2, (8, 3.2))
    found = results["scaling"]
    for axes, chosen, by, label in (
        (left, [at for at in found if at["rows"] == 2], "latents", "latent tokens, 2 rows"),
        (right, [at for at in found if at["latents"] == 4096], "rows", "rows of 4,096 latent tokens"),
    ):
        chosen = sorted(chosen, key=lambda at: at[by])
        x = [at[by] for at in chosen]
        axes.plot(x, [at["ms"] for at in chosen], "o-", color=OURS, label="bagel_opt")
        floor = [1000 * at["tflop"] / rated for at in chosen]
        axes.plot(x, floor, "--", color=FLOOR, label=f"floor at the rated {rated:.0f} TFLOP/s")
        for at in chosen:
            axes.annotate(f"{at['ms']:.0f}", (at[by], at["ms"]), xytext=(6, -9), textcoords="offset points", fontsize=8)
        axes.set_xticks(x)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08)
    left.set_ylabel("ms per evaluation", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    _save(left, out)


def _axes(count: int, size: tuple[float, float]) -> list[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, count, figsize=size, squeeze=False)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return [*axes[0]]


def _save(axes: Any, out: Path) -> None:
    axes.figure.tight_layout()
    with replacing(out) as partial:
        axes.figure.savefig(partial, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bagel_opt.bench.charts", description=__doc__.split(":")[0])
    parser.add_argument(
        "results", type=Path, help="the JSON of bagel-opt bench --preset h100 --official DIR --json FILE"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for bars.png and scaling.png")
    parser.add_argument("--rated", type=float, default=989, help="the card's dense bfloat16 TFLOP/s")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    bars(results, args.out / "bars.png")
    scaling(results, args.rated, args.out / "scaling.png")


if __name__ == "__main__":
    main()
