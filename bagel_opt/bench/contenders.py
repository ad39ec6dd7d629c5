"""Ours at full size, from any runtime, for full_size.py."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

from bagel_opt.api import Model
from bagel_opt.bench.full_size_official import PROMPT, TOKENS
from bagel_opt.lance.config import Config
from bagel_opt.loading import load_bundle
from bagel_opt.model.attention import choose
from bagel_opt.model.families import build
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.ops import TorchOps
from bagel_opt.programs.signatures import NEXT
from bagel_opt.request import Request
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.sampling.job import Observer
from bagel_opt.tokenizer import Tokenizer

DTYPE = torch.bfloat16


class Ours:
    """A model, asked for what the official code is asked for. several: whether it is also timed on several requests."""

    def __init__(self, model: Model, several: bool):
        self.model, self.several = model, several
        self.drawn: list[float] = []  # seconds of denoising of each picture, from its filled contexts to its latents

    def draw(self, inputs: list, count: int = 1, **options: object) -> list[Image.Image]:
        self.drawn.clear()
        requests = [Request(inputs, seed=i, **options) for i in range(count)]
        outputs = self.model.run_many(requests, observers=[self._timer() for _ in requests])
        return [pictures[-1] for pictures in outputs]

    def _timer(self) -> Observer:
        begun = []

        def denoising(begins: bool) -> None:
            if begins:
                torch.cuda.synchronize()
                begun.append(time.perf_counter())
            else:  # the latents are on the host
                self.drawn.append(time.perf_counter() - begun[0])

        return Observer(on_denoising=denoising)

    def tokens(self, rows: int = 1, inputs: Sequence[str | Image.Image] = (PROMPT,)) -> list[float]:
        """Milliseconds per token."""
        seen: list[float] = []
        answer = {"output": "text", "do_sample": True, "text_temperature": 1000.0, "max_think_tokens": TOKENS + 2}
        requests = [Request(inputs, seed=i, **answer) for i in range(rows)]
        requests[0] = Request(inputs, seed=0, on_token=lambda _: seen.append(time.perf_counter()), **answer)
        self.model.run_many(requests)
        return [1000 * (b - a) for a, b in itertools.pairwise(seen)][1:]

    def decode(self, latents: list[ndarray]) -> list[ndarray]:
        """What a canvas gives the VAE, a call each, to pixels on the host."""
        runtime, state, found = self.model.runtime, [], []
        for number, latent in enumerate(latents):
            pixels, _, *state = runtime.run("vae_decode" + NEXT * (number > 0), [latent, *state])
            found.append(runtime.host(pixels))
        return found

    def velocity(self, noise: Tensor, side: int = 1024) -> Tensor:
        """The first guided velocity of a picture that starts at this noise."""
        seen: list[Tensor] = []
        shape = {"height": side, "width": side, "num_timesteps": 2, "noise": noise}
        self.model.generate(PROMPT, on_step=lambda event: seen.append(event.v_t), **shape)
        return seen[0].double()


def random_model(
    config: Config,
    device: torch.device,
    kinds: Mapping[str, str] = MappingProxyType({}),
    on_host: Callable[[str], bool] = lambda name: False,
) -> Mixture:
    """Random weights in bfloat16, the same ones wherever they lie, one after another made on the device, quantised where their
    part is in `kinds`, and left there or on the host."""
    with torch.device("meta"):
        model, there = build(config).to(DTYPE), build(config)
    model.quantize(kinds)
    for name, module in model.named_modules():
        module.to_empty(device="cpu" if on_host(f"{name}.") else device, recurse=False)
    model.eval().requires_grad_(False)
    generator, parameters = torch.Generator(device).manual_seed(0), dict(model.named_parameters())
    for name, like in there.named_parameters():
        made = torch.empty(like.shape, dtype=DTYPE, device=device)
        if name.endswith(".gamma") or (made.ndim == 1 and name.endswith(".weight")):  # a norm
            made.fill_(1.0)
        else:
            made.normal_(0, 0.02, generator=generator)
        if name in parameters:
            parameters[name].data.copy_(made)
        else:
            model.get_submodule(name.removesuffix(".weight")).quantized.store(made)
    return model


def in_process(model: Mixture, tokenizer: Tokenizer, compiled: bool = True) -> Ours:
    """The model as it is, under torch.compile or eager."""
    model.ops = TorchOps(choose("auto", model.device, model.dtype))
    runtime = TorchRuntime(prepare(model, compiled))
    return Ours(Model(runtime, model.config, tokenizer, round_up=True), several=True)


def from_bundle(folder: Path) -> Ours:
    """The model from a bundle, which has rows for one request."""
    return Ours(load_bundle(folder, check=False), several=False)
