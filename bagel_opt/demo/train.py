"""Makes the model that ships again from nothing: python -m bagel_opt.demo.train --out DIR

A tokenizer from the world's texts, then the VAE, then ViT and transformer together (arXiv 2505.14683, section 3). All
batches and all noise follow from the seed and the step. Interrupted, it goes on from its last saved state.
"""

import argparse
import math
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_opt.cli.console import guarded
from bagel_opt.config import BagelConfig
from bagel_opt.demo import data, objective, texts
from bagel_opt.demo.examples import write_examples
from bagel_opt.demo.layout import GRID, demo_config, write_checkpoint, write_tokenizer
from bagel_opt.demo.loop import Run, Settings, Stopped, Weights, deterministic
from bagel_opt.demo.samples import reconstruction_sheet, training_sheet
from bagel_opt.demo.world import BACKGROUNDS, SIDE, middle, sample_scene
from bagel_opt.devices import torch_device
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.replacing import save_picture
from bagel_opt.files.written_config import write_config
from bagel_opt.model.bagel import Bagel
from bagel_opt.sampling.planning import THINK_IMAGE, THINK_TEXT
from bagel_opt.tokenizer import Tokenizer

TEXT_WEIGHT = 0.3  # of cross-entropy beside the flow's error
SHAPE_WEIGHT = 8.0  # of the pixels of shapes, few as they are, above the background's
KL_WEIGHT, MOMENTS_WEIGHT = 5e-4, 0.1  # of the VAE's two pulls towards latents of unit variance


# ---- the VAE


class Pictures(torch.utils.data.Dataset):
    """Batch number `step` of random pictures, in bytes [count, side, side, 3], and their backgrounds' colours [count, 3].

    The first three quarters of the steps see crops of half the side around a thing, which cost a quarter.
    """

    def __init__(self, seed: int, count: int, steps: int):
        self.seed, self.count, self.steps = seed, count, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = Random(f"vae {self.seed} {step}")
        scenes = [sample_scene(rng, held_out=False) for _ in range(self.count)]
        colours = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
        pictures = data.stack(scenes)
        if step >= self.steps * 3 // 4:
            return pictures, colours
        half, crops = SIDE // 2, []
        for picture, scene in zip(pictures, scenes, strict=True):
            x, y = (min(max(at - rng.randint(12, half - 12), 0), half) for at in middle(rng.choice(scene.things)))
            crops.append(picture[y : y + half, x : x + half])
        return torch.stack(crops), colours


def train_vae(run: Run, model: Bagel) -> None:
    """Absolute error of the pixels, with latents drawn to unit variance after the published scale and shift."""
    s, vae, c = run.settings, model.vae.to(memory_format=torch.channels_last), model.config.vae
    weights = Weights(list(vae.parameters()), s.average)

    def prepare(batch: tuple, generator: torch.Generator) -> tuple:
        pictures, _ = batch
        shape = len(pictures), c.z_channels, *(side // c.downsample for side in pictures.shape[1:3])
        return *batch, torch.randn(shape, generator=generator, device=run.device)

    def compute(batch: tuple) -> dict[str, Tensor]:
        pictures, colours, noise = batch
        x = objective.pixels(pictures, run.dtype).contiguous(memory_format=torch.channels_last)
        moments = vae.encoder(x).float()
        z = objective.scaled_latents(moments, noise, c)
        mean, log_variance = moments.chunk(2, dim=1)
        mean, log_variance = c.scale_factor * (mean - c.shift_factor), log_variance + 2 * math.log(c.scale_factor)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        off = z.mean(dim=(0, 2, 3)).square().mean() + (z.var(dim=(0, 2, 3)) - 1).square().mean()
        y = vae.decoder((z / c.scale_factor + c.shift_factor).to(run.dtype)).float()
        error = (y - x.float()).abs()
        shape = (pictures != colours[:, None, None]).any(dim=-1)[:, None].float()
        weighted = (error * (1 + SHAPE_WEIGHT * shape)).mean()
        (weighted + KL_WEIGHT * kl + MOMENTS_WEIGHT * off).backward()
        found = {"error": error.mean(), "shapes": (error * shape).sum() / 3 / shape.sum(), "kl": kl, "moments": off}
        return {name: value.detach() for name, value in found.items()}

    def show(name: str) -> None:
        page, error = reconstruction_sheet(model, run.device)
        save_picture(page, run.out / name)
        run.log(stage="vae", sheet=name, held_out_error=error)

    run.stage(
        "vae", weights, s.vae_steps, s.vae_rate, Pictures(s.seed, s.vae_batch, s.vae_steps), prepare, compute, show
    )
    weights.copy_average()


# ---- ViT and transformer


def train_transformer(run: Run, model: Bagel, tokenizer: Tokenizer) -> None:
    s, c = run.settings, model.config
    weights = Weights([p for name, p in model.named_parameters() if not name.startswith("vae.")], s.average)
    layer_step, encode = objective.run_layer, model.vae.encoder
    if run.device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        layer_step = torch.compile(objective.run_layer, dynamic=False)  # one layer, compiled for each kind of batch
        encode = torch.compile(encode, dynamic=False)

    def prepare(batch: tuple, generator: torch.Generator) -> tuple:
        pictures, kinds = batch
        grid = GRID * c.latent_patch_size
        noise = torch.randn(len(pictures), c.vae.z_channels, grid, grid, generator=generator, device=run.device)
        shape = GRID**2, c.latent_dim
        return (
            pictures,
            noise,
            {kind: (rows, objective.draw_noise(rows, shape, generator)) for kind, rows in kinds.items()},
        )

    def compute(batch: tuple) -> dict[str, Tensor]:
        pictures, noise, kinds = batch
        x = objective.pixels(pictures, run.dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = objective.scaled_latents(encode(x), noise, c.vae)
            patches = objective.tokens(x, c.vit.patch_size)
            latents = objective.tokens(latents, c.latent_patch_size)
        found = {}
        for kind, (rows, drawn) in kinds.items():
            parts = objective.losses(model, rows, patches, latents, drawn, layer_step)
            sum(value * (TEXT_WEIGHT if name == "text" else 1.0) for name, value in parts.items()).backward()
            found |= {f"{kind}_{name}": value.detach() for name, value in parts.items()}
        return found

    def show(name: str) -> None:
        save_picture(training_sheet(model, tokenizer), run.out / name)

    dataset = data.Batches(tokenizer, s.seed, s.pairs, s.steps)
    run.stage("transformer", weights, s.steps, s.rate, dataset, prepare, compute, show)
    weights.restart()  # a second cycle of the rate, from the average of the first (arXiv 1608.03983)
    dataset = data.Batches(tokenizer, s.seed + 1, s.pairs, s.refine_steps)
    run.stage("refine", weights, s.refine_steps, s.rate / 2, dataset, prepare, compute, show)
    weights.copy_average()


def fresh(config: BagelConfig, seed: int) -> Bagel:
    """A model of random weights: torch's own for linear maps and convolutions, small tables, small steps of residuals."""
    torch.manual_seed(seed)
    model = Bagel(config)
    with torch.no_grad():
        model.llm.embed.weight.normal_(std=0.1)
        for table in (model.vit_position, model.latent_position, model.vit_encoder.position):
            table.weight.normal_(std=0.3)
        for layer in model.llm.layers:
            for expert in (layer.und, layer.gen):
                for out in (expert.o, expert.down):
                    out.weight.mul_((2 * len(model.llm.layers)) ** -0.5)
        for name, parameter in model.vae.named_parameters():
            if name.endswith(("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")):
                parameter.zero_()  # residual blocks start as nothing, so that the way through is short
        model.latent_out.weight.zero_()
        model.latent_out.bias.zero_()
    return model


def train(out: Path, settings: Settings, device: str | torch.device, stop_after: float = math.inf) -> Path:
    """Trains into `out` and returns the folder of the finished checkpoint. Raises Stopped after `stop_after` seconds."""
    checkpoint = out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    run = Run(out, settings, torch.device(device), stop_after)
    if not (checkpoint / "tokenizer.json").is_file():
        write_tokenizer(checkpoint, [*[THINK_TEXT, THINK_IMAGE] * 500, *texts.corpus(Random(settings.seed), 2000)])
    tokenizer = Tokenizer(checkpoint / "tokenizer.json")
    config = demo_config(tokenizer.special)
    write_config(checkpoint, config)
    write_examples(checkpoint)
    model = fresh(config, settings.seed).to(run.device, run.dtype)
    objective.use_lookups(model)
    try:
        # cuDNN's attention is not deterministic, and in torch 2.11 its gradients can be NaN (pytorch issue 196678)
        with deterministic(), sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            train_vae(run, model)
            # what ships is rounded to bfloat16, so the transformer learns that VAE's latents
            model.vae.to(torch.bfloat16).to(run.dtype).requires_grad_(False)
            train_transformer(run, model, tokenizer)
    finally:
        write_checkpoint(checkpoint, model)  # of an unfinished run too, to look at
    Checkpoint(checkpoint).check(model)
    run.log(stage="done", bytes=sum(path.stat().st_size for path in checkpoint.iterdir()))
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships, from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the model is in its checkpoint/")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="save and stop")
    for name, field in Settings.__dataclass_fields__.items():
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, **kind)
    a = parser.parse_args()
    settings = Settings(**{name: getattr(a, name) for name in Settings.__dataclass_fields__})

    def run() -> None:
        try:
            print(train(a.out, settings, torch_device(a.device), a.stop_after))
        except Stopped as stopped:
            print(stopped)

    raise SystemExit(guarded(run))


if __name__ == "__main__":
    main()
