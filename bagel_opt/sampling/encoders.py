"""A request's pictures through the ViT and the VAE: each is encoded once, in as many calls as it says.

Those of a video take long. So what runs them is a generator: it yields None between two calls, and others go on.
"""

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from bagel_opt.images import InputImage
from bagel_opt.lance.pictures import LanceInput
from bagel_opt.programs.interface import Tensor
from bagel_opt.programs.signatures import NEXT, OUTPUTS
from bagel_opt.sampling.batches import Batches, padded


class Encoders:
    """What they made of the images of a request, by the images' numbers."""

    def __init__(self, batches: Batches):
        self.batches, self.runtime, self.joins = batches, batches.runtime, batches.config.vit_joins
        self.seen: dict[int, Tensor | np.ndarray] = {}
        self.moments: dict[int, list[np.ndarray]] = {}
        self.begun: dict[int, Future] = {}

    def begin(self, number: int, image: InputImage | LanceInput) -> None:
        """Cuts an image into patches in a thread of its own, meanwhile, and hands them to the device: the host takes 40 ms for a
        large one, in which a device would have nothing to do."""
        if number not in self.seen and number not in self.begun:
            pool = ThreadPoolExecutor(1, "patches")
            self.begun[number] = pool.submit(self._patches, image, self.runtime.ahead)
            pool.shutdown(wait=False)

    def clear(self) -> None:
        self.begun.clear()
        self.seen.clear()
        self.moments.clear()

    def embeddings(self, number: int, image: InputImage | LanceInput, size: int) -> Generator:
        """ViT embeddings [1, size, channels]."""
        if number not in self.seen:
            parts = []
            begun = self.begun.pop(number, None)
            for part in begun.result() if begun else self._patches(image):
                if parts:
                    yield None
                parts.append(self._see(*part))
            self.seen[number] = parts[0][0]
            if self.joins:  # several parts, of fewer embeddings than patches
                found = [self.runtime.host(part, 0)[:count] for part, count in parts]
                self.seen[number] = padded(np.concatenate(found), size)[None]
        return self.seen[number]

    def _see(self, inputs: list, count: int) -> tuple[Tensor, int]:
        """One call of the ViT: embeddings, and how many are real."""
        return self.runtime.run("vit", inputs)[0], count

    def _patches(
        self, image: InputImage | LanceInput, held: Callable[[np.ndarray], Any] = lambda values: values
    ) -> list[tuple[list, int]]:
        """Of each call of the ViT what it takes, and how many embeddings are real. held: makes the first call's patches what it
        takes in their place; those of a long video would fill the device."""
        found = []
        for patches, places in image.patches():
            n, size = len(patches), self.batches.size("patches", len(patches))
            given = padded(patches, size)[None]
            inputs = [given if found else held(given), padded(places, size)[None], np.array([n], np.int64)]
            found.append((inputs, n // (self.joins or 1)))
        return found

    def latents(self, number: int, image: InputImage | LanceInput, noise: np.ndarray) -> Generator:
        """Latent tokens [tokens, channels], drawn from the VAE's posterior."""
        if number not in self.moments:
            self.moments[number] = yield from self.in_turn("vae_encode", image.frames(), lambda moments: moments)
        return image.latents(self.moments[number], noise)

    def in_turn(self, program: str, parts: list[np.ndarray], made: Callable[..., Any]) -> Generator:
        """One part after the other through the VAE, which keeps of each what the next needs. -> what `made` makes of the
        outputs of each, on the host. What is kept takes memory, so one request at a time has several parts under way; a
        single part waits for nobody."""
        while len(parts) > 1 and self.batches.coding:
            yield None
        outputs, state, found = OUTPUTS[program], [], []
        self.batches.coding += len(parts) > 1
        try:
            for number, part in enumerate(parts):
                if number:
                    yield None
                out = self.runtime.run(program + NEXT * (number > 0), [part, *state])
                state = list(out[outputs:])
                found.append(made(*(self.runtime.host(tensor) for tensor in out[:outputs])))
        finally:
            self.batches.coding -= len(parts) > 1
        return found
