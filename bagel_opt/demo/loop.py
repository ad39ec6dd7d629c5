"""The training loop: float32 weights with their average, CUDA graphs, logs, and states to go on from."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_opt.files.replacing import replacing


@dataclass(frozen=True)
class Settings:
    """How much is trained; the defaults make the model that ships."""

    seed: int = 0
    vae_steps: int = 8000
    vae_batch: int = 64
    vae_rate: float = 1e-3
    steps: int = 13500
    refine_steps: int = 9000  # of a second cycle, at half the rate
    pairs: int = 128  # pictures before and after an edit per step
    rate: float = 1e-3
    average: float = 0.999  # decay of the exponential moving average
    workers: int = 14
    save_every: int = 500
    sheets: int = 4  # sample sheets per stage
    log_every: int = 100
    graphs: bool = True  # CUDA graphs


MOST_SKIPPED = 0.01  # share of steps; with more, a run is broken


class Stopped(Exception):
    """Training was stopped by its time limit and can go on."""


class Weights:
    """Float32 copies of a model's parameters, trained by AdamW, and their moving average. The model itself computes in
    its own dtype and gets each new value rounded."""

    def __init__(self, parameters: list[Tensor], average: float):
        self.parameters, self.average = parameters, average
        self.values = [p.detach().float().clone() for p in parameters]
        self.averaged = [value.clone() for value in self.values]
        self.gradients = [torch.empty_like(value) for value in self.values]
        decayed = [v for v in self.values if v.ndim > 1]
        rest = [v for v in self.values if v.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=parameters[0].is_cuda)
        self.skipped = torch.zeros((), device=parameters[0].device)  # steps whose gradients were not finite

    def step(self, rate: float, number: int) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        for value, gradient in zip(self.values, self.gradients, strict=True):
            value.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.values, 1.0, foreach=True)
        broken = (~norm.isfinite()).float()  # one broken batch costs its step, and not the whole run
        self.skipped += broken
        if norm.is_cuda:
            self.adam.found_inf = broken  # its kernels look at it, and the host need not wait
        elif broken:
            return
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)
            # early on, the average follows faster: it would remember the start for too long
            torch._foreach_lerp_(self.averaged, self.values, max(1 - self.average, 1 / (number + 10)))

    def copy_average(self) -> None:
        """Puts the averaged values into the model."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averaged)

    def restart(self) -> None:
        """Goes on from the averaged values, with an Adam that remembers nothing."""
        with torch.no_grad():
            torch._foreach_copy_(self.values, self.averaged)
        self.adam.state.clear()
        self.copy_values()

    def copy_values(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)

    def state(self) -> dict[str, Tensor]:
        found = {}
        for i, (value, averaged) in enumerate(zip(self.values, self.averaged, strict=True)):
            adam = self.adam.state[value]
            found |= {f"value.{i}": value, f"averaged.{i}": averaged, "step": adam["step"].cpu()}
            found |= {f"{name}.{i}": adam[name] for name in ("exp_avg", "exp_avg_sq")}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        for i, (value, averaged) in enumerate(zip(self.values, self.averaged, strict=True)):
            value.copy_(state[f"value.{i}"])
            averaged.copy_(state[f"averaged.{i}"])
            adam = {name: state[f"{name}.{i}"].to(value.device) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[value] = {"step": state["step"].clone().to(value.device), **adam}
        self.copy_values()


class Step:
    """Losses with their gradients. On CUDA each shape of batch becomes a graph: one by one, the kernels take several
    times as long to launch as to run.

    compute(batch) -> {name: loss}, after having called backward. All that it needs must be in the batch.
    """

    def __init__(self, compute: Callable, parameters: list[Tensor], device: torch.device, graphs: bool):
        self.compute, self.parameters, self.device = compute, parameters, device
        self.graphs: dict[tuple, tuple] | None = {} if graphs and device.type == "cuda" else None

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        if self.graphs is None:
            return self._run(to(batch, self.device))
        shapes = tuple(tensor.shape for tensor in leaves(batch))
        if shapes not in self.graphs:
            self.graphs[shapes] = self._capture(to(batch, self.device))
        graph, inputs, found, gradients = self.graphs[shapes]
        for old, new in zip(leaves(inputs), leaves(batch), strict=True):
            old.copy_(new, non_blocking=True)
        graph.replay()
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        return found

    def _run(self, batch: Any) -> dict[str, Tensor]:
        for p in self.parameters:
            p.grad = None
        return self.compute(batch)

    def _capture(self, batch: Any) -> tuple:
        """(graph, its inputs, its losses, its gradients), after a warm-up on a stream of its own, as torch asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        for p in self.parameters:
            p.grad = None  # so that the graph's own memory holds the gradients
        graph = torch.cuda.CUDAGraph()
        # the thread that pins the next batches may go on allocating meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = self.compute(batch)
        return graph, batch, found, [p.grad for p in self.parameters]


class Run:
    """One training run in a folder: its log, its state, its clock."""

    def __init__(self, out: Path, settings: Settings, device: torch.device, stop_after: float):
        self.out, self.settings, self.device = out, settings, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.start, self.stop_after = time.monotonic(), stop_after

    def generator(self, *what: object) -> torch.Generator:
        """Noise that follows from the seed and from what it is for."""
        number = Random(f"{self.settings.seed} {what}").getrandbits(62)
        return torch.Generator(self.device).manual_seed(number)

    def loader(self, dataset: torch.utils.data.Dataset, first: int) -> Iterator:
        workers = self.settings.workers
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, len(dataset)),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )
        return iter(loader)

    def stage(
        self,
        name: str,
        weights: Weights,
        steps: int,
        rate: float,
        dataset: torch.utils.data.Dataset,
        prepare: Callable[[Any, torch.Generator], Any],
        compute: Callable[[Any], dict[str, Tensor]],
        show: Callable[[str], None],
    ) -> None:
        """Trains for `steps` steps, from the saved state where there is one. prepare(batch, generator) adds the noise,
        compute is for `Step`. The learning rate warms up and then falls along a cosine."""
        path = self.out / f"{name}.state.safetensors"
        first = 0
        if path.is_file():
            try:
                state = load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); remove it to begin this stage anew") from None
            first = int(state["done"])
            weights.restore(state)
        run_step = Step(compute, weights.parameters, self.device, self.settings.graphs)
        batches, waited, logged = self.loader(dataset, first), 0.0, (time.monotonic(), first)
        for step in range(first, steps):
            begun = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - begun
            warm = min(1.0, (step + 1) / min(300, steps / 4))
            found = run_step(prepare(batch, self.generator(name, step)))
            weights.step(rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2), step)
            done = step + 1
            if done % self.settings.log_every == 0 or done == steps:
                numbers = {key: round(value.item(), 5) for key, value in found.items()}
                numbers["skipped"] = int(weights.skipped)
                now = time.monotonic()
                per_second = (done - logged[1]) / (now - logged[0])
                self.log(
                    stage=name, step=done, **numbers, steps_per_second=per_second, waited=waited / (now - logged[0])
                )
                if numbers["skipped"] > MOST_SKIPPED * done:
                    raise FloatingPointError(
                        f"{name}: {numbers['skipped']} of {done} steps had gradients that are not finite; try a smaller rate"
                    )
                waited, logged = 0.0, (now, done)
            late = time.monotonic() - self.start > self.stop_after
            if done % self.settings.save_every == 0 or done == steps or late:
                save(path, {**weights.state(), "done": torch.tensor(done)})
                if done < steps and late:
                    weights.copy_average()
                    raise Stopped(f"{name}: stopped after step {done} of {steps}; the same command goes on from there")
            sheets = self.settings.sheets
            if sheets and (done % -(-steps // sheets) == 0 or done == steps):
                weights.copy_average()
                show(f"{name}-{done:05}.png")
                weights.copy_values()

    def log(self, **entry: object) -> None:
        entry = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()}
        entry["seconds"] = round(time.monotonic() - self.start)
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")


def leaves(batch: Any) -> Iterator[Tensor]:
    """The tensors of nested dicts, tuples and lists."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | tuple | list):
        for value in batch.values() if isinstance(batch, dict) else batch:
            yield from leaves(value)


def to(batch: Any, device: torch.device) -> Any:
    """Nested dicts, tuples and lists with their tensors on a device, in memory of their own there."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [to(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as partial:  # so that an interruption leaves the last state whole
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same sums in every run on the same device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
