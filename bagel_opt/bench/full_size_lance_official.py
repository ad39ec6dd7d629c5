"""Lance's official code at full size, on our parameters, for full_size_lance.py."""

import importlib.util
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bagel_opt.bench.official import module, stand_in
from bagel_opt.files.checkpoint import published_tensors
from bagel_opt.lance.config import DEVIATIONS, MEANS, SIDE, LanceConfig
from bagel_opt.model.lance import Lance
from bagel_opt.request import Request
from bagel_opt.sampling.plan import Plan
from bagel_opt.sampling.planning import make_plan
from bagel_opt.tokenizer import Tokenizer

# The parts of the official code that draw from a text.
NEEDED = "modeling/lance/lance.py"
CAPTION, TEMPLATE, TARGET = 0, -1, 1  # what it calls the kinds of tokens
GUIDANCE = {"cfg_text_scale": 4.0, "cfg_interval": [0.4, 1.0], "cfg_renorm_min": 0.0, "cfg_renorm_type": "global"}


def check_checkout(checkout: str) -> None:
    """Raises FileNotFoundError where it is none of Lance's official code."""
    if not (Path(checkout) / NEEDED).is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of Lance's official code: it has no {NEEDED}")


def assemble(checkout: str, model: Lance) -> tuple[Any, Any]:
    """The official model, without its ViT, and the official autoencoder, whose parameters are ours, in the same memory. Its
    table of places has room for 25 frames, which is its default."""
    flash = {name: found for name, found in sys.modules.items() if name.split(".")[0] == "flash_attn"}
    stand_in()
    if not importlib.util.find_spec("imageio"):  # imported, and not used here
        module("imageio")
    sys.path.insert(0, checkout)
    from common.utils.misc import AutoEncoderParams
    from modeling.lance import LanceConfig as OfficialConfig
    from modeling.lance import Qwen2Config, Qwen2ForCausalLM
    from modeling.lance.lance import Lance as OfficialLance
    from modeling.vae.wan.model import WanVideoVAE
    from modeling.vae.wan.vae2_2 import Wan2_2_VAE, WanVAE_

    del sys.modules["flash_attn"]  # what stood in for it; ours takes the real one
    sys.modules.update(flash)
    c, device = model.config, model.device
    llm = Qwen2Config(
        **asdict(c.llm),
        max_position_embeddings=128000,
        layer_module="Qwen2MoTDecoderLayer",
        qk_norm_und=True,
        qk_norm_gen=True,
        apply_qwen_2_5_vl_pos_emb=True,
        vision_start_token_id=c.special.start_of_image,
        image_token_id=pad_token(c) - 1,
        video_token_id=pad_token(c),
        vision_config={"spatial_merge_size": 2, "tokens_per_second": c.vit.tokens_per_second},
    )
    llm.rope_scaling = {"mrope_section": [*c.mrope_section]}
    config = OfficialConfig(
        visual_und=False,
        llm_config=llm,
        vae_config=AutoEncoderParams(c.vae.downsample, c.vae.frames, c.vae.z_channels),
        latent_patch_size=(1, 1, 1),
        max_latent_size=SIDE,
    )
    v = c.vae
    with torch.device("meta"):
        lance = OfficialLance(Qwen2ForCausalLM(llm), None, config=config)
        wan = WanVAE_(
            v.encoder[0],
            v.decoder[-1],
            v.z_channels,
            [width // v.encoder[0] for width in v.encoder[1:]],
            v.num_res_blocks,
            temperal_downsample=[*v.encoder_time],
        )
    weights = dict(published_tensors(model))
    table = model.places(torch.arange(len(lance.latent_pos_embed.pos_embed), device=device))
    weights["latent_pos_embed.pos_embed"] = table
    wan.load_state_dict({k[4:]: w for k, w in weights.items() if k.startswith("vae.")}, assign=True)
    lance.load_state_dict({k: w for k, w in weights.items() if not k.startswith(("vae.", "vit_model."))}, assign=True)
    rotary = lance.language_model.model.rotary_emb
    exponent = torch.arange(0, c.llm.head_dim, 2, device=device).float() / c.llm.head_dim
    rotary.inv_freq = rotary.original_inv_freq = 1.0 / c.llm.rope_theta**exponent
    inner, vae = (kind.__new__(kind) for kind in (Wan2_2_VAE, WanVideoVAE))  # their own constructors read a file
    mean, deviation = (torch.tensor(numbers, device=device, dtype=model.dtype) for numbers in (MEANS, DEVIATIONS))
    inner.dtype, inner.scale, inner.model = model.dtype, [mean, 1.0 / deviation], wan.eval()
    vae.dtype, vae.device, vae.vae = model.dtype, device, inner
    return lance.eval(), vae


def pad_token(c: LanceConfig) -> int:
    """What stands for a latent in the sequence of tokens; only that it is no other matters."""
    return c.llm.vocab_size - 1


def sample(plan: Plan, config: LanceConfig) -> dict[str, Any]:
    """What the official data set makes of a text and of what is to be drawn of it."""
    special, canvas = config.special, plan.canvas
    ids, modality, lengths = [], [], []
    for block, kind in zip(plan.main, (TEMPLATE, CAPTION, TEMPLATE), strict=True):
        ids += block.ids
        modality += [kind] * len(block.ids)
        lengths.append(len(block.ids))
    first, tokens = len(ids) + 1, canvas.tokens
    ids += [special.start_of_image, *[pad_token(config)] * tokens, special.end_of_image, special.eos_token_id]
    modality += [TARGET] * (tokens + 2) + [TEMPLATE]
    latents = torch.arange(first, first + tokens)
    frames, rows, columns = canvas.grid
    return {
        "val_packed_text_ids": torch.tensor(ids),
        "val_packed_text_indexes": torch.tensor([*range(first), *range(first + tokens, len(ids))]),
        "val_packed_vit_tokens": None,
        "val_packed_vit_token_indexes": None,
        "val_packed_position_ids": torch.zeros(len(ids)),  # made anew
        "val_packed_vae_token_indexes": latents,
        "val_mse_loss_indexes": latents,
        "val_sample_lens": [len(ids)],
        "val_split_lens": [*lengths, tokens + 2, 1],
        "val_attn_modes": [*["causal"] * len(lengths), "noise", "causal"],
        "val_sample_N_target": [1],
        "video_grid_thw": torch.tensor([[[frames, 2 * rows, 2 * columns]]]),  # in patches of the ViT
        "video_sizes": [(canvas.frames, *canvas.size)],
        "sample_task": torch.zeros(len(ids)),
        "sample_modality": torch.tensor(modality),
        "apply_qwen_2_5_vl_pos_emb": True,
    }


class OfficialLance:
    """The official code's own drawing from a text, with our parameters in place of its own."""

    def __init__(self, checkout: str, model: Lance, tokenizer: Tokenizer):
        self.config, self.tokenizer, self.device, self.dtype = model.config, tokenizer, model.device, model.dtype
        self.lance, self.vae = assemble(checkout, model)
        self.drawn: list[float] = []  # seconds of denoising of each picture or video
        self.begun: float | None = None
        self.flow: list[Tensor] = []  # what the first step's branches predicted
        evaluate = self.lance.language_model.forward_inference

        def timed(*args: Any, **given: Any) -> Any:
            if self.begun is None and not given["update_past_key_values"]:  # the contexts are filled
                torch.cuda.synchronize()
                self.begun = time.perf_counter()
            return evaluate(*args, **given)

        self.lance.language_model.forward_inference = timed
        self.lance.llm2vae.register_forward_hook(self._watched)

    def _watched(self, module: Any, inputs: Any, output: Tensor) -> None:
        if len(self.flow) < 2:
            self.flow.append(output[1:-1])  # but for the markers

    def draw(self, inputs: list[str], count: int = 1, **options: Any) -> list[np.ndarray]:
        """-> frames [F, H, W, 3] of each"""
        self.drawn.clear()
        return [self._decoded(self._latents(inputs, **options)) for _ in range(count)]

    def _latents(self, inputs: list[str], noise: Tensor | None = None, **options: Any) -> Tensor:
        self.flow.clear()
        self.begun = None
        plan = make_plan(Request(inputs, seed=0, **options), self.config, self.tokenizer)
        given = sample(plan, self.config)
        given = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in given.items()}
        given |= {"num_timesteps": len(plan.steps), "timestep_shift": plan.options.timestep_shift, **GUIDANCE}
        begins = mock.patch.object(torch, "randn", return_value=noise) if noise is not None else nullcontext()
        with begins, torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            found = self.lance.validation_gen_KVcache(**given, device=self.device, dtype=self.dtype)
        torch.cuda.synchronize()
        self.drawn.append(time.perf_counter() - self.begun)
        return found[0][0]

    def _decoded(self, latent_FHWZ: Tensor) -> np.ndarray:
        (pixels_3FHW,) = self.vae.vae_decode([latent_FHWZ])
        frames = pixels_3FHW.permute(1, 2, 3, 0).float().clip(-1, 1).mul_(0.5).add_(0.5).mul_(255).round()
        return frames.to(torch.uint8).cpu().numpy()

    def decode(self, latents: list[np.ndarray]) -> None:
        """What a canvas gives the VAE, to pixels on the host."""
        latent_ZFHW = torch.from_numpy(np.concatenate(latents, axis=2)[0])
        self._decoded(latent_ZFHW.permute(1, 2, 3, 0).to(self.device, self.dtype))

    def velocity(self, noise: Tensor, prompt: str, side: int) -> Tensor:
        """The first guided velocity of a picture that starts at this noise."""
        given = noise.to(self.device, self.dtype, copy=True)
        self._latents([prompt], given, height=side, width=side, num_timesteps=2)
        v, without = (part.double().cpu() for part in self.flow[:2])
        guided = without + GUIDANCE["cfg_text_scale"] * (v - without)
        return guided * min(1.0, float(v.norm() / guided.norm()))
