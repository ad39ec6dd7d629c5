"""Rounding to 8 and 4 bits, from the definition: tables of all codes, and float64."""

import numpy as np
from torch import Tensor

LEAST = 1e-12  # scale
# All numbers from 0 up, in their codes' order: e4m3 has 3 bits behind the point and exponents from -6 to 8, of which the
# last code is NaN (arXiv 2209.05433, table 1).
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
CODES = {"fp8": np.array(E4M3), "int8": np.arange(128.0)}


def nearest(x: np.ndarray, kind: str) -> np.ndarray:
    """What codes stand for: of two equally near ones that with an even code."""
    table, size = CODES[kind], np.minimum(np.abs(x), CODES[kind][-1])
    above = np.searchsorted(table, size).clip(0, len(table) - 1)
    below = (above - 1).clip(0)
    up, down = table[above] - size, size - table[below]
    taken = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(table[taken], x)


def rounded(x: Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of rows; the scale brings a row's largest number to the last code. Scales and quotients are float32."""
    x = x.float().numpy()
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / CODES[kind][-1]), np.float32(LEAST))
    return nearest((x / scale).astype(np.float64), kind), scale.astype(np.float64)[..., 0]


def unpacked(codes: Tensor, scale: Tensor, channels: int) -> np.ndarray:
    """The numbers that groups of 32 in 4 bits stand for: a byte has two channels, each plus 8, the first in its low bits."""
    found = np.zeros((len(codes), scale.shape[1] * 32))
    for group in range(scale.shape[1]):
        packed = codes[:, group * 16 : group * 16 + 16].numpy().astype(int)
        numbers = np.stack((packed % 16, packed // 16), axis=2).reshape(len(codes), 32) - 8
        found[:, group * 32 : group * 32 + 32] = numbers * scale[:, group, None].double().numpy()
    return found[:, :channels]
