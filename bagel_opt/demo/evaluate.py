"""How often the model that ships does what it is told: python -m bagel_opt.demo.evaluate [CHECKPOINT_OR_BUNDLE]

On prompts, edits and questions with combinations that training never saw. A picture counts as right where the checker
reads off it exactly what was asked for; an edit, where moreover all else is as it was; an answer, where it is the
expected text.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from torch import Tensor

import bagel_opt
from bagel_opt.cli.argument_types import quantization
from bagel_opt.cli.console import guarded
from bagel_opt.demo import texts
from bagel_opt.demo.checker import shows
from bagel_opt.demo.world import Scene, draw, sample_scene
from bagel_opt.files.finding import find_bundle
from bagel_opt.files.replacing import replacing
from bagel_opt.model.attention import Visible
from bagel_opt.model.ops import TorchOps
from bagel_opt.request import Request
from bagel_opt.sampling.step_caches import BranchSeer, Drift

PROMPTS, EDITS, QUESTIONS, TIMESTEPS = 100, 60, 100, 25
THINK = {"think": True, "max_think_tokens": 256}  # with room for 1000, every step looks at as many slots


@dataclass(frozen=True)
class Case:
    """What goes in, and what must come out: a scene that the picture shows, or a text."""

    kind: str
    inputs: list
    wanted: Scene | str


def prompts(count: int = PROMPTS) -> list[Case]:
    rng = Random("held-out prompts")
    asked = [texts.sample_prompt(rng, sample_scene(rng, held_out=True), placed=True) for _ in range(count)]
    return [Case("prompt", [text], wish) for text, wish in asked]


def edits(count: int = EDITS) -> list[Case]:
    """As many of each kind of edit."""
    rng, kinds = Random("held-out edits"), tuple(texts.EDIT_WORDS)
    asked = [texts.sample_edit(rng, held_out=True, kind=kinds[i % len(kinds)]) for i in range(count)]
    return [Case(edit.kind, [draw(edit.before), edit.text], edit.wish) for edit in asked]


def questions(count: int = QUESTIONS) -> list[Case]:
    rng = Random("held-out questions")
    asked = [texts.sample_question(rng, sample_scene(rng, held_out=True)) for _ in range(count)]
    return [Case(question.kind, [draw(question.scene), question.text], question.answer) for question in asked]


def right(model: bagel_opt.Model, cases: list[Case], together: bool = True, **options: object) -> list[bool]:
    """Whether the model does each case right; together: all in one `run_many`, else one after another."""
    requests = []
    for number, case in enumerate(cases):
        kind = {"output": "text"} if isinstance(case.wanted, str) else {"num_timesteps": TIMESTEPS, "seed": number}
        requests.append(Request(case.inputs, **{**kind, **options}))
    outputs = model.run_many(requests) if together else [model.run_many([request])[0] for request in requests]
    return [_right(case.wanted, result[-1]) for case, result in zip(cases, outputs, strict=True)]


def _right(wanted: Scene | str, got: object) -> bool:
    if isinstance(wanted, str):
        return got.split("</think>")[-1].strip() == wanted
    return shows(got, wanted)


class MixedOps(TorchOps):
    """Lets all rows of a flow step see each other's keys, as when guidance branches are packed without a mask.

    For showing what isolation is worth: eager models on SDPA, one request at a time.
    """

    def attend(self, q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Visible) -> Tensor:
        rows = len(q_BQHD)
        if rows > 1 and not seen.causal:
            k_BSGD, v_BSGD = (x.flatten(0, 1)[None].expand(rows, -1, -1, -1) for x in (k_BSGD, v_BSGD))
            seen = seen._replace(mask=seen.mask.flatten()[None, None, None])
        return super().attend(q_BQHD, k_BSGD, v_BSGD, seen)


@contextlib.contextmanager
def branches_mixed(model: bagel_opt.Model) -> Iterator[None]:
    """Gives an eager model MixedOps for a while."""
    network = model.runtime.model
    network.ops, right = MixedOps(), network.ops
    try:
        yield
    finally:
        network.ops = right


def full_evaluations(steps: int) -> int:
    """How many of a branch's evaluations TaylorSeer makes in full."""
    seer = BranchSeer()
    return sum(seer.next() for _ in range(steps))


@contextlib.contextmanager
def tea_steps() -> Iterator[list[bool]]:
    """Whether each step that TeaCache decides on is evaluated."""
    due, seen = Drift.due, []

    def noted(*arguments: object) -> bool:
        seen.append(due(*arguments))
        return seen[-1]

    Drift.due = noted
    try:
        yield seen
    finally:
        Drift.due = due


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how often the model does what it is told.")
    parser.add_argument("checkpoint", nargs="?", help="checkpoint folder or bundle (default: the model that ships)")
    parser.add_argument("--backend", default="eager", help="eager or compile; a bundle brings its own")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--profile", help="profile file or name")
    parser.add_argument("--quantization", type=quantization, help="fp8 or int8, or by part, as gen=fp8,und=int8")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after so long")
    parser.add_argument("--json", type=Path, help="also write the table there")
    a = parser.parse_args()
    raise SystemExit(guarded(lambda: measure(a)))


def measure(a: argparse.Namespace) -> None:
    """Prints the table, each row as JSON when it is there."""
    names = ("backend", "device", "dtype", "profile", "quantization")
    model = bagel_opt.load(a.checkpoint, **{name: getattr(a, name) for name in names})
    steps = TIMESTEPS - 1
    table, found, start = Table("task", "options", "evaluations", "right", "seconds"), [], time.monotonic()

    def row(task: str, cases: list[Case], told: str = "", evaluations: object = "", **options: object) -> None:
        if time.monotonic() - start > a.seconds:
            return
        begun = time.monotonic()
        with tea_steps() as seen:
            good = right(model, cases, **options)
        evaluations = f"{sum(seen) / len(good):.0f}" if seen else evaluations
        entry = [task, told, str(evaluations), f"{sum(good)} of {len(good)}", f"{time.monotonic() - begun:.1f}"]
        table.add_row(*entry)
        found.append(dict(zip(("task", "options", "evaluations", "right", "seconds"), entry, strict=True)))
        found[-1]["wrong"] = [f"{case.kind}: {case.inputs[-1]}" for case, ok in zip(cases, good, strict=True) if not ok]
        print(json.dumps(found[-1]), flush=True)

    tasks: dict[str, Callable[[], list[Case]]] = {"prompts": prompts, "edits": edits, "questions": questions}
    for task, cases in tasks.items():
        row(task, cases(), evaluations="" if task == "questions" else steps)
        row(task, cases(), "think", "" if task == "questions" else steps, **THINK)
    for scale in (1.0, 2.0, 8.0):  # 4 is the default
        row("prompts", prompts(), f"cfg_text_scale={scale:g}", steps, cfg_text_scale=scale)
    row("edits", edits(), "cfg_text_scale=1", steps, cfg_text_scale=1.0)
    row("prompts", prompts(), "step_cache=taylorseer", full_evaluations(steps), step_cache="taylorseer")
    row("prompts", prompts(), "num_timesteps=12", full_evaluations(steps), num_timesteps=full_evaluations(steps) + 1)
    row(
        "prompts",
        prompts(),
        "step_cache=taylorseer, num_timesteps=50",
        full_evaluations(49),
        step_cache="taylorseer",
        num_timesteps=50,
    )
    row("prompts", prompts(), "num_timesteps=50", 49, num_timesteps=50)
    for count in (TIMESTEPS, 50):
        told = f"step_cache=teacache, num_timesteps={count}"
        row("prompts", prompts(), told, step_cache="teacache", num_timesteps=count)
    # exported code is what it is; eager attention alone can be told to mix branches
    if a.backend == "eager" and not (a.checkpoint and find_bundle(a.checkpoint)):
        row("prompts", prompts(), "one at a time", steps, together=False)
        with branches_mixed(model):
            row("prompts", prompts(), "one at a time, branches mixed", steps, together=False)
    Console().print(table)
    if a.json:
        with replacing(a.json) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
