"""The flow's schedule and noise, and when TaylorSeer evaluates it: host side, plain numbers."""

import itertools
from dataclasses import dataclass

import numpy as np

MAX_ORDER = 6  # TaylorSeer's highest difference, as the official code sets it
WARM_UP = 5  # full evaluations at the start
INTERVAL = 3  # afterwards every third evaluation is a full one


@dataclass(frozen=True)
class FlowStep:
    t: float
    dt: float
    guided: bool


def schedule(num_timesteps: int, timestep_shift: float, cfg_interval: tuple[float, float]) -> list[FlowStep]:
    """The num_timesteps - 1 Euler steps from t = 1 (noise) to t = 0 (picture), in float32 like the official code."""
    one, shift = np.float32(1), np.float32(timestep_shift)
    step, last = one / np.float32(num_timesteps - 1), num_timesteps - 1
    # torch.linspace counts from both ends towards the middle
    t = np.array([one - step * i if i < num_timesteps // 2 else step * (last - i) for i in range(num_timesteps)])
    t = (shift * t / (one + (shift - one) * t)).astype(np.float32)
    low, high = (np.float32(bound) for bound in cfg_interval)
    return [FlowStep(float(a), float(a - b), bool(low < a <= high)) for a, b in itertools.pairwise(t)]


def seeded_noise(seed: int | None, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Normal draws of the given shapes, in order, from torch's CPU generator; None takes a fresh seed."""
    import torch

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


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
