"""Nucleus sampling (arXiv 1904.09751), on logits that a program handed out: so bundles need no program of their own for it."""

import numpy as np


def sample(logits_V: np.ndarray, temperature: float, top_p: float, uniform: float) -> int:
    """From the fewest likeliest tokens that have together at least `top_p` of the probability at this temperature.
    uniform: in [0, 1), where their distribution is inverted, in the vocabulary's order as `ChooseToken` does. -> id"""
    weight_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
    falling_V = np.sort(weight_V)[::-1]
    mass_V = falling_V.cumsum()
    count = np.searchsorted(mass_V, top_p * mass_V[-1]) + 1
    least = falling_V[min(count, len(falling_V)) - 1]
    inside_V = weight_V > least
    inside_V[np.flatnonzero(weight_V == least)[: count - inside_V.sum()]] = True
    mass_V = np.where(inside_V, weight_V, 0).cumsum()
    return int(np.searchsorted(mass_V, uniform * mass_V[-1], side="right"))
