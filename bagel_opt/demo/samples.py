"""What a model in training can do so far, as sheets."""

from random import Random

import numpy as np
import torch
from PIL import Image

from bagel_opt import images
from bagel_opt.api import Model
from bagel_opt.demo import texts
from bagel_opt.demo.sheet import Cell, sheet
from bagel_opt.demo.world import draw, sample_scene
from bagel_opt.model.bagel import Bagel
from bagel_opt.request import Request
from bagel_opt.runtime.torch import TorchRuntime
from bagel_opt.runtime.torch_setup import prepare
from bagel_opt.tokenizer import Tokenizer


def training_sheet(model: Bagel, tokenizer: Tokenizer) -> Image.Image:
    """Six held-out prompts and six held-out edits."""
    rng = Random(0)
    whole = Model(TorchRuntime(prepare(model)), model.config, tokenizer)
    prompts = [texts.sample_prompt(rng, sample_scene(rng, held_out=True), placed=True)[0] for _ in range(6)]
    edits = [texts.sample_edit(rng, held_out=True) for _ in range(6)]
    requests = [Request(prompt, seed=0, num_timesteps=25) for prompt in prompts]
    requests += [Request([draw(edit.before), edit.text], seed=0, num_timesteps=25) for edit in edits]
    pictures = [outputs[0] for outputs in whole.run_many(requests)]
    return sheet(
        {
            "Prompts": [Cell(picture, prompt) for prompt, picture in zip(prompts, pictures[:6], strict=True)],
            "Edits": [Cell(draw(edit.before), edit.text) for edit in edits],
            "": [Cell(picture) for picture in pictures[6:]],
        }
    )


def reconstruction_sheet(model: Bagel, device: torch.device) -> tuple[Image.Image, float]:
    """Eight held-out pictures and what the VAE makes of each; and the mean absolute error of 64 such, in 1/255."""
    rng, before, after, errors, c = Random(0), [], [], [], model.config.vae
    for _ in range(64):
        picture = draw(sample_scene(rng, held_out=True))
        pixels = torch.from_numpy(images.pixels(picture))[None].to(device)
        with torch.no_grad():
            mean = model.vae.encode(pixels).chunk(2, dim=1)[0]
            decoded = model.vae.decode(c.scale_factor * (mean - c.shift_factor))[0].cpu().numpy()
        errors.append(float(np.abs(decoded.astype(int) - np.asarray(picture)).mean()))
        before.append(Cell(picture))
        after.append(Cell(Image.fromarray(decoded), f"{errors[-1]:.2f}"))
    return sheet({"Pictures": before[:8], "Reconstructions": after[:8]}), sum(errors) / len(errors)
