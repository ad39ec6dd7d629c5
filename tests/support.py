"""The official answers, and how to compare with them."""

import json
import os
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import bagel_opt
from bagel_opt import Profile, Request
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.sampling.batches import Batches, Context
from bagel_opt.sampling.job import Job
from bagel_opt.sampling.reading import Texts

ROOT = Path(bagel_opt.__file__).parent.parent  # of the checkout
GOLDEN = Path(__file__).parent / "golden"
ODD = Path(__file__).parent / "golden_odd"  # the same for a checkpoint that shares no size with the other
CHECKPOINT = GOLDEN / "checkpoint"
OFFICIAL = {  # the official code's names where ours differ
    "max_think_token_n": "max_think_tokens",
    "understanding_output": None,
    "enable_taylorseer": None,
    "image_shapes": None,
}


def prefill(model, plan, blocks, profile):
    """Keys and values [layers, tokens, heads, channels] of a context that has read these blocks, in the official order of
    tokens: an image between its markers."""
    batches, context = Batches(model.runtime, model.config, profile), Context(0, profile.rows - 1)
    batches.open(context)
    for want in Job(plan, batches, model.tokenizer).reader.read(context, blocks, plan):
        if want:
            assert Texts(batches)([want]) == [None]
    order, start = [], 0
    for block in blocks:
        slots = list(range(start, start + block.length))
        order += slots if block.kind == "text" else [slots[0], *slots[2:], slots[1]]  # stored with both markers first
        start += block.length
    layers = model.config.llm.num_hidden_layers
    stacked = torch.stack([torch.as_tensor(model.runtime.host(c, context.row)) for c in batches[0].caches])
    return stacked[:layers, order], stacked[layers:, order]


def examples(most: int) -> settings:
    """For a costly property: so many examples, or the share of them that the first tier's profile takes."""
    return settings(max_examples=max(1, most * settings().max_examples // 100), deadline=None)


@dataclass(frozen=True)
class Case:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def checkpoint(self) -> Path:
        return self.folder.parent.parent / "checkpoint"

    @cached_property
    def data(self) -> dict:
        return json.loads((self.folder / "case.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    @property
    def inputs(self) -> list:
        return [self._item(item) for item in self.data["input"]]

    @property
    def outputs(self) -> list:
        return [self._item(item) for item in self.data["output"]]

    def _item(self, item: dict):
        return Image.open(self.folder / item["image"]) if "image" in item else item["text"]

    @property
    def options(self) -> dict:
        args = self.data["args"]
        options = {OFFICIAL.get(name, name): value for name, value in args.items()}
        options.pop(None, None)
        options["output"] = "text" if args.get("understanding_output") else "image"
        if args.get("enable_taylorseer"):
            options["step_cache"] = "taylorseer"
        if "image_shapes" in args:
            options["height"], options["width"] = args["image_shapes"]
        if "noise" in self.tensors:
            options["noise"] = self.tensors["noise"]
        if noises := self.series("vae_noise.{}"):
            options["vae_noise"] = noises
        return options

    def series(self, name: str) -> list[torch.Tensor]:
        found = []
        while name.format(len(found)) in self.tensors:
            found.append(self.tensors[name.format(len(found))])
        return found

    def request(self, **changes) -> Request:
        return Request(self.inputs, **{**self.options, **changes})

    def velocity_error(self, events: list) -> float:
        """The largest relative error of the guided velocities that were kept."""
        kept = [(event, self.tensors[f"flow.{event.index}.v_t"]) for event in events if self._kept(event.index)]
        for event, _ in kept:
            assert event.t == self.tensors[f"flow.{event.index}.t"].item()
        return max((relative(event.v_t, want) for event, want in kept), default=0.0)

    def _kept(self, index: int) -> bool:
        return f"flow.{index}.v_t" in self.tensors

    def check_outputs(self, outputs: list, share: float = 1e-3) -> None:
        """Texts equal; pictures equal but for single steps of 1/255 in a share of the values."""
        assert len(outputs) == len(self.outputs)
        for got, want in zip(outputs, self.outputs, strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                difference = np.abs(np.asarray(got).astype(int) - np.asarray(want))
                assert difference.max() <= 1
                assert (difference > 0).mean() < share


def cases(golden: Path = GOLDEN) -> list[Case]:
    return [Case(golden / "cases" / name) for name in json.loads((golden / "index.json").read_text())["cases"]]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def check_together(alone, together) -> None:
    """run_many of all golden cases by one model gives what another gives each by itself."""
    events = [[] for _ in cases()]
    requests = [case.request(on_step=seen.append) for case, seen in zip(cases(), events, strict=True)]
    for case, outputs, seen in zip(cases(), together.run_many(requests), events, strict=True):
        expected = []
        case.check_outputs(outputs)
        wanted = alone.run(case.inputs, on_step=expected.append, **case.options)
        for got, want in zip(outputs, wanted, strict=True):
            if isinstance(want, str):
                assert got == want
            else:
                assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
        for got, want in zip(seen, expected, strict=True):
            assert relative(got.x_t, want.x_t) < 1e-5
            assert relative(got.v_t, want.v_t) < 1e-5


class Poisoned(TorchRuntime):
    """Hands out memory full of large finite garbage in place of zeros."""

    def caches(self, rows, slots):
        return [100 * torch.randn_like(cache) for cache in super().caches(rows, slots)]

    def zeros(self, shape, hidden=False):
        return 100 * torch.randn_like(super().zeros(shape, hidden))


def draw_profile(data: st.DataObject, need: Profile) -> Profile:
    """With room for requests that need that much, and some more."""
    extra = st.integers(0, 40)
    return Profile(
        "drawn",
        rows=data.draw(st.integers(1, 5)),
        text=data.draw(st.integers(7, 80)),
        patches=need.patches + data.draw(extra),
        latents=need.latents + data.draw(extra),
        slots=700 + data.draw(extra),
    )


def random_inputs(rows, queries, slots, heads, kv_heads, channels, seed=0, dtype=torch.float32, device="cpu"):
    """Queries, keys, values and kv_len for the attention op."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    kv_len = torch.randint(queries, slots + 1, (rows,), generator=generator)
    kv = [draw(rows, slots, kv_heads, channels) for _ in range(2)]
    return draw(rows, queries, heads, channels), *kv, kv_len.to(device)


def forked(call, *arguments):
    """What call(*arguments) does to a process, a fork of this one, which need not import torch: like
    `subprocess.run`, with what the call returns for the exit status."""
    (out, to_out), (errors, to_errors) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        speak_to(to_out, to_errors)
        exit_with(call, *arguments)
    for end in (to_out, to_errors):
        os.close(end)
    with open(out) as out, open(errors) as errors, ThreadPoolExecutor(1) as pool:
        told = pool.submit(errors.read)
        said = out.read(), told.result()
    return subprocess.CompletedProcess(call, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said)


def speak_to(out, errors):
    """Makes these files standard output and standard error, past what pytest has put there."""
    for number, file, name in ((1, out, "stdout"), (2, errors, "stderr")):
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))


def exit_with(call, *arguments):
    """Ends a forked process with the exit status that a call returns, within two minutes."""
    signal.alarm(120)
    status = 1
    try:
        status = given if isinstance(given := call(*arguments), int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
