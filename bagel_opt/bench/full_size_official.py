"""The official code at full size, on our parameters, for full_size.py."""

import itertools
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel_opt.bench.official import stand_in
from bagel_opt.files.checkpoint import published_tensors
from bagel_opt.model.bagel import Bagel
from bagel_opt.tokenizer import Tokenizer

# The work that both are given.
PROMPT = " ".join(["a large red circle beside a small blue star"] * 9)
DEFAULTS = {"cfg_text_scale": 4.0, "cfg_interval": (0.4, 1.0), "timestep_shift": 3.0, "num_timesteps": 50}
TOKENS = 64


class OfficialTokenizer:
    """What the official code asks of its tokenizer, by ours."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode = tokenizer.encode

    def decode(self, ids: Tensor) -> str:
        return "<|im_start|><|im_end|>"  # random tokens may be rows of the table that have no word


def assemble(checkout: str, model: Bagel, tokenizer: Tokenizer) -> Any:
    """The official inferencer, whose parameters are ours, in the same memory."""
    flash = {name: found for name, found in sys.modules.items() if name.split(".")[0] == "flash_attn"}
    stand_in()
    sys.path.insert(0, checkout)
    from data.transforms import ImageTransform
    from inferencer import InterleaveInferencer
    from modeling import bagel as official
    from modeling.autoencoder import AutoEncoder, AutoEncoderParams

    del sys.modules["flash_attn"]  # what stood in for it; ours takes the real one
    sys.modules.update(flash)
    c, device = model.config, model.device
    llm = official.Qwen2Config(
        **asdict(c.llm),
        max_position_embeddings=32768,
        qk_norm=True,
        layer_module="Qwen2MoTDecoderLayer",
        tie_word_embeddings=False,
    )
    vit = official.SiglipVisionConfig(
        **{k: v for k, v in asdict(c.vit).items() if k != "num_positions"}, image_size=980, rope=False
    )
    v = c.vae
    vae_sizes = 256, 3, v.downsample, v.ch, 3, [*v.ch_mult], v.num_res_blocks, v.z_channels, v.scale_factor
    vae_params = AutoEncoderParams(*vae_sizes, v.shift_factor)
    config = official.BagelConfig(
        llm_config=llm,
        vit_config=vit,
        vae_config=vae_params,
        vit_max_num_patch_per_side=c.vit_side,
        connector_act="gelu_pytorch_tanh",
        latent_patch_size=c.latent_patch_size,
        max_latent_size=c.latent_side,
    )
    with torch.device("meta"):
        bagel = official.Bagel(official.Qwen2ForCausalLM(llm), official.SiglipVisionModel(vit), config)
        bagel.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit, meta=True)
        vae = AutoEncoder(vae_params)
    weights = dict(published_tensors(model))
    vae.load_state_dict({k[4:]: w for k, w in weights.items() if k.startswith("vae.")}, assign=True)
    bagel.load_state_dict({k: w for k, w in weights.items() if not k.startswith("vae.")}, assign=True)
    rotary = bagel.language_model.model.rotary_emb
    exponent = torch.arange(0, c.llm.head_dim, 2, device=device).float() / c.llm.head_dim
    rotary.inv_freq = rotary.original_inv_freq = 1.0 / c.llm.rope_theta**exponent
    transforms = ImageTransform(1024, 512, 16), ImageTransform(980, 224, 14)
    return InterleaveInferencer(bagel.eval(), vae.eval(), OfficialTokenizer(tokenizer), *transforms, asdict(c.special))


class Official:
    """The official code's own inferencer, with our parameters in place of its own."""

    several = False

    def __init__(self, checkout: str, model: Bagel, tokenizer: Tokenizer):
        self.inferencer = assemble(checkout, model, tokenizer)
        self.device = model.device
        self.drawn: list[float] = []
        self.noise: Tensor | None = None
        self.flow: list[Tensor] = []
        bagel = self.inferencer.model
        for name in ("update_text", "update_vae", "update_vit"):
            self._move_inputs(bagel, f"forward_cache_{name}")
        for name in ("generate_image", "generate_text"):
            self._move_inputs(bagel, name)
        generate, flow = bagel.generate_image, bagel._forward_flow

        def timed(**given: Any) -> list[Tensor]:
            if self.noise is not None:
                given["packed_init_noises"] = self.noise
            torch.cuda.synchronize()
            begun = time.perf_counter()
            latents = generate(**given)
            torch.cuda.synchronize()
            self.drawn.append(time.perf_counter() - begun)
            return latents

        def watched(*args: Any, **given: Any) -> Tensor:
            self.flow.append(flow(*args, **given))
            return self.flow[-1]

        bagel.generate_image, bagel._forward_flow = timed, watched

    def _move_inputs(self, model: Any, method: str) -> None:
        """The official code prepares its inputs on the CPU, and leaves it to accelerate's hooks to move them."""
        original = getattr(model, method)

        def moved(*args: Any, **given: Any) -> Any:
            here = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            return original(*args, **here)

        setattr(model, method, moved)

    def draw(self, inputs: list, count: int = 1, **options: Any) -> list[Image.Image]:
        self.drawn.clear()
        self.flow.clear()
        options = {"cfg_img_scale": 1.0, **options, "cfg_interval": [*options["cfg_interval"]]}
        if "height" in options:
            options["image_shapes"] = options.pop("height"), options.pop("width")
        return [self.inferencer.interleave_inference(inputs, **options)[-1] for _ in range(count)]

    def tokens(self, rows: int = 1) -> list[float]:
        seen: list[float] = []

        def tick(*_: Any) -> None:
            torch.cuda.synchronize()
            seen.append(time.perf_counter())

        hook = self.inferencer.model.language_model.lm_head.register_forward_hook(tick)
        answer = {"understanding_output": True, "do_sample": True, "text_temperature": 1000.0}
        self.inferencer.interleave_inference([PROMPT], max_think_token_n=TOKENS + 2, **answer)
        hook.remove()
        return [1000 * (b - a) for a, b in itertools.pairwise(seen)][1:]

    def decode(self, latents: list[np.ndarray]) -> None:
        (latent,) = (torch.from_numpy(one).to(self.device, torch.bfloat16) for one in latents)
        with torch.no_grad():
            self.inferencer.vae_model.decode(latent).cpu()

    def velocity(self, noise: Tensor) -> Tensor:
        self.noise = noise
        self.draw([PROMPT], height=1024, width=1024, **{**DEFAULTS, "num_timesteps": 2})
        self.noise = None
        return self.flow[0].double().cpu()
