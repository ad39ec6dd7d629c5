"""The official answers of Lance, and how to compare with them."""

import functools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from support import relative

import bagel_opt
from bagel_opt import Request

GOLDEN = Path(__file__).parent / "golden_lance"
CHECKPOINT = GOLDEN / "checkpoint"
OFFICIAL = {  # the official code's names
    "validation_num_timesteps": "num_timesteps",
    "validation_timestep_shift": "timestep_shift",
    "video_height": "height",
    "video_width": "width",
    "max_length": "max_think_tokens",
    "validation_data_seed": None,
}
OUTPUTS = {"t2i": "image", "image_edit": "image", "t2v": "video", "i2v": "video", "video_edit": "video"}


@functools.cache
def loaded():
    return bagel_opt.load(CHECKPOINT, device="cpu")


@dataclass(frozen=True)
class LanceCase:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def data(self) -> dict:
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    def _pictures(self, names: list[str]) -> list[Image.Image]:
        return [Image.open(self.folder / name) for name in names]

    @cached_property
    def inputs(self) -> list:
        found = []
        for item in self.data["input"]:
            if "image" in item:
                found += self._pictures([item["image"]])
            elif text := item.get("text", item.get("question")):
                found.append(text)
        return found

    @cached_property
    def options(self) -> dict:
        options = {OFFICIAL.get(name, name): value for name, value in self.data["args"].items()}
        options.pop(None, None)
        options["output"] = OUTPUTS.get(self.data["task"], "text")
        for item in self.data["input"]:
            if "system" in item:
                options["system_prompt"] = item["system"]
            if "video" in item:
                options |= {"video": self._pictures(item["video"]), "fps": item["fps"]}
        if "noise" in self.tensors:
            options["noise"] = self.tensors["noise"]
        if "vae_encode.0.noise" in self.tensors:
            options["vae_noise"] = self.tensors["vae_encode.0.noise"]
        return options

    def request(self, **changes) -> Request:
        return Request(self.inputs, **{**self.options, **changes})

    def velocity_error(self, events: list) -> float:
        """The largest relative error of the guided velocities that were kept."""
        assert len(events) == self.data["flow_steps"]
        kept = [event for event in events if f"flow.{event.index}.v_t" in self.tensors]
        assert kept or not events
        for event in kept:
            assert event.t == self.tensors[f"flow.{event.index}.t"].max().item()
        return max((relative(e.v_t, self.tensors[f"flow.{e.index}.v_t"]) for e in kept), default=0.0)

    def check_outputs(self, outputs: list, share: float = 1e-3) -> None:
        """Texts equal; pictures equal but for single steps of 1/255 in a share of the values."""
        (got,), (want,) = outputs, self.data["output"]
        if "text" in want:
            assert got == want["text"]
            return
        frames = [got] if "image" in want else got
        for frame, expected in zip(frames, self._pictures(want.get("video") or [want["image"]]), strict=True):
            difference = np.abs(np.asarray(frame).astype(int) - np.asarray(expected))
            assert difference.max() <= 1
            assert (difference > 0).mean() < share


def cases() -> list[LanceCase]:
    return [LanceCase(GOLDEN / "cases" / name) for name in json.loads((GOLDEN / "index.json").read_text())["cases"]]
