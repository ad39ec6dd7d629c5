"""How much of each adapter counts that the runtime keeps apart, for requests in the rows of a batch. K adapters."""

import numpy as np

from bagel_opt.options import Options
from bagel_opt.programs.interface import Runtime


def check_adapters(runtime: Runtime, options: Options) -> None:
    """Raises ValueError for an adapter that the runtime does not have."""
    kept = runtime.adapters or {}
    if unknown := sorted(set(options.adapters or ()) - set(kept)):
        there = f"there are {', '.join(map(repr, kept))}" if kept else "this model keeps none apart"
        raise ValueError(f"adapters: there is no {unknown[0]!r:.80}; {there}")


def adapter_share(runtime: Runtime, options: Options) -> np.ndarray:
    """What counts for a request: [K]."""
    kept = runtime.adapters or {}
    counts = kept if options.adapters is None else options.adapters
    return np.array([counts.get(name, 0.0) for name in kept], np.float32)


def as_inputs(share_BK: np.ndarray) -> list[np.ndarray]:
    """What programs with layers take besides their inputs: nothing where there are no adapters."""
    return [share_BK] if share_BK.shape[1] else []
