"""The flow's schedule and noise: host side, plain numbers."""

import itertools
import math
import secrets
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FlowStep:
    t: float
    dt: float
    guided: bool


def schedule(num_timesteps: int, timestep_shift: float, cfg_interval: tuple[float, float]) -> list[FlowStep]:
    """The num_timesteps - 1 Euler steps from t = 1 (noise) to t = 0 (picture), in float32 like the official code."""
    # As torch.linspace does: from both ends towards the middle, with one rounding, in which double helps.
    step, last = float(np.float32(1 / (num_timesteps - 1))), num_timesteps - 1
    linear = [1 - step * i if i < num_timesteps // 2 else step * (last - i) for i in range(num_timesteps)]
    t, one = np.array(linear, np.float32), np.float32(1)
    t = np.float32(timestep_shift) * t / (one + np.float32(timestep_shift - 1) * t)
    low, high = (np.float32(bound) for bound in cfg_interval)
    return [FlowStep(float(a), float(a - b), bool(low < a <= high)) for a, b in itertools.pairwise(t)]


def seeded_noise(seed: int | None, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Normal draws of the given shapes, in order, as torch.randn makes them on the CPU after torch.manual_seed; None
    takes a fresh seed. Where torch is missing they are the same up to rounding (5e-7)."""
    if seed is None:
        seed = secrets.randbits(63)
    try:
        import torch
    except ImportError:
        uniform = np.random.MT19937()
        uniform._legacy_seeding(seed & 0xFFFFFFFF)
        return [_normal(uniform, math.prod(shape)).reshape(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def _normal(uniform: np.random.MT19937, count: int) -> np.ndarray:
    """torch's draw of `count` >= 16 normals: Box-Muller over 8 + 8 uniforms of 24 bits, the last 16 anew if the count is no multiple."""

    def draw(number: int) -> np.ndarray:
        u = (uniform.random_raw(number) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        a, b = u[: number // 16 * 16].reshape(-1, 2, 8).transpose(1, 0, 2)
        radius, angle = np.sqrt(-2 * np.log(1 - a)), np.float32(2 * np.pi) * b
        return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)

    found = draw(count)
    return found if count % 16 == 0 else np.concatenate([found[: count - 16], draw(16)])
