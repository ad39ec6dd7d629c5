"""The flow's schedule and noise, and when TaylorSeer and TeaCache evaluate it: host side, plain numbers."""

import itertools
import math
import secrets
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 6  # TaylorSeer's highest difference, as the official code sets it
WARM_UP = 5  # full evaluations at the start
INTERVAL = 3  # afterwards every third evaluation is a full one
STORE, REUSE = 1, 2  # what TeaCache does with a row
MOST_CHANGE = 0.05  # of TeaCache: how far the input may drift, relatively, before it is evaluated again


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


class TaylorSeer:
    """When one guidance branch is evaluated in full and when predicted (arXiv 2503.06923, as BAGEL sets it up).

    Full at the branch's own evaluations 0 to 4, 7, 10, ...; differences are taken from evaluation 4 on.
    """

    def __init__(self):
        self.evaluation = -1
        self.last_full = 0
        self.factors = 0  # how many orders are stored

    def next(self) -> bool:
        """Moves on by one evaluation; True where it is a full one."""
        self.evaluation += 1
        late = self.evaluation - (WARM_UP - 1)
        return late <= 0 or late % INTERVAL == 0

    def store(self) -> tuple[int, int]:
        """Records a full evaluation: (differences to take, distance to the full evaluation before)."""
        differences = min(self.factors, MAX_ORDER) if self.evaluation >= WARM_UP - 1 else 0
        distance = self.evaluation - self.last_full
        self.last_full, self.factors = self.evaluation, differences + 1
        return differences, distance

    @property
    def distance(self) -> int:
        """Evaluations since the last full one."""
        return self.evaluation - self.last_full


class TeaCache:
    """When a request is evaluated, and when what its last evaluation added to the input serves again (arXiv 2411.19108).

    The relative changes of the transformer's input from step to step are added up; from MOST_CHANGE on it is evaluated.
    So are the first and the last step, and the first with more branches, as where guidance begins. All branches go
    together: they have the same input. The paper fits a polynomial of the change to each model; for BAGEL none has been
    published, so the change itself counts.
    """

    def __init__(self, steps: int):
        self.left = steps
        self.drift = 0.0
        self.branches = 0  # at the last evaluation

    def due(self, change: float, branches: int) -> bool:
        """Moves on by one step, whose input differs from the last one's by `change`; True where it is evaluated."""
        self.left -= 1
        self.drift += change
        if branches > self.branches or self.left == 0 or not self.drift < MOST_CHANGE:
            self.drift, self.branches = 0.0, branches
            return True
        return False
