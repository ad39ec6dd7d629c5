"""The official code on the same weights and the same work, as the baseline: python official.py JOB prints its figures.

It stands alone, so that it runs in an environment of its own with what that code needs (transformers 4.49, safetensors,
Pillow, einops, accelerate). FlashAttention is not needed: on a GPU the same kernels inside PyTorch stand in for it, on a
CPU SDPA per sequence. torchvision and cv2, of which it uses next to nothing, are stood in for where they are missing.
"""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file


def module(name: str, **content: Any) -> types.ModuleType:
    found = types.ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    found.__dict__.update(content)
    sys.modules[name] = found
    return found


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> torch.Tensor:
    """flash_attn_varlen_func's part that BAGEL calls; causal is aligned to the last key."""
    if q.is_cuda:
        lengths = int(max_seqlen_q), int(max_seqlen_k)
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, 0.0, causal, False
        )[0]
    out = []
    bounds = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
    for (a, b), (c, d) in bounds:
        parts = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)) if causal and b - a > 1 else None
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


class ToTensor:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    def __init__(self, mean: list[float], std: list[float], inplace: bool = False):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


def stand_in() -> None:
    module("flash_attn", flash_attn_varlen_func=varlen)
    if not importlib.util.find_spec("cv2"):
        module("cv2")
    if importlib.util.find_spec("torchvision"):
        return
    mode = types.SimpleNamespace(BICUBIC=Image.Resampling.BICUBIC)
    functional = module(
        "torchvision.transforms.functional",
        resize=lambda image, size, mode, antialias=True: image.resize(size[::-1], mode),
    )
    transforms = module(
        "torchvision.transforms", functional=functional, InterpolationMode=mode, ToTensor=ToTensor, Normalize=Normalize
    )
    module("torchvision", transforms=transforms)


def read(folder: str, name: str) -> dict:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return json.load(file)


def load(checkout: str, folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """An InterleaveInferencer of the checkpoint, as the official app makes one."""
    stand_in()
    sys.path.insert(0, checkout)
    from data.data_utils import add_special_tokens
    from data.transforms import ImageTransform
    from inferencer import InterleaveInferencer
    from modeling.autoencoder import AutoEncoder, AutoEncoderParams
    from modeling.bagel import (
        Bagel,
        BagelConfig,
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )
    from modeling.qwen2 import Qwen2Tokenizer

    top = read(folder, "config.json")
    llm_file, vit_file = (os.path.join(folder, f"{name}.json") for name in ("llm_config", "vit_config"))
    files = ["ema.safetensors"]
    if not os.path.exists(os.path.join(folder, files[0])):
        files = sorted(set(read(folder, "model.safetensors.index.json")["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        if file != "ae.safetensors":
            weights |= load_file(os.path.join(folder, file))

    def side(name: str) -> int:
        return math.isqrt(len(weights[name]))

    llm = Qwen2Config.from_json_file(llm_file)
    llm.qk_norm, llm.tie_word_embeddings, llm.layer_module = True, False, "Qwen2MoTDecoderLayer"
    vit = SiglipVisionConfig.from_json_file(vit_file)
    vit.rope, vit.num_hidden_layers = False, vit.num_hidden_layers - 1
    v = top.get("vae_config", {})
    mult = v.get("ch_mult", [1, 2, 4, 4])
    factors = v.get("scale_factor", 0.3611), v.get("shift_factor", 0.1159)
    sizes = v.get("ch", 128), 3, mult, v.get("num_res_blocks", 2), v.get("z_channels", 16)
    vae_params = AutoEncoderParams(256, 3, 2 ** (len(mult) - 1), *sizes, *factors)
    config = BagelConfig(
        llm_config=llm,
        vit_config=vit,
        vae_config=vae_params,
        vit_max_num_patch_per_side=side("vit_pos_embed.pos_embed"),
        connector_act="gelu_pytorch_tanh",
        latent_patch_size=2,
        max_latent_size=side("latent_pos_embed.pos_embed"),
    )
    with torch.device(device):
        model = Bagel(Qwen2ForCausalLM(llm), SiglipVisionModel(vit), config)
        vae = AutoEncoder(vae_params)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    model.load_state_dict(weights)
    vae.load_state_dict(load_file(os.path.join(folder, "ae.safetensors")))
    tokenizer, special, _ = add_special_tokens(Qwen2Tokenizer.from_pretrained(folder))
    resize = {"vae": (1024, 512, 16), "vit": (980, 224, 14)}
    if os.path.exists(os.path.join(folder, "preprocessor_config.json")):
        given = read(folder, "preprocessor_config.json")
        resize |= {k: tuple(given[k][f] for f in ("max_size", "min_size", "stride")) for k in resize if k in given}
    model, vae = model.to(device, dtype).eval(), vae.to(device, dtype).eval()
    transforms = (ImageTransform(*resize[kind]) for kind in ("vae", "vit"))
    return InterleaveInferencer(model, vae, tokenizer, *transforms, special)


def figures(inferencer: Any, work: dict, device: torch.device) -> dict[str, list[float]]:
    model, seen = inferencer.model, []

    def tick(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seen.append(time.perf_counter())

    def stamps(inputs: list, **options: Any) -> list[float]:
        seen.clear()
        tick()
        inferencer.interleave_inference(inputs, **options)
        return [1000 * (b - a) for a, b in itertools.pairwise(seen)]

    flow = model._forward_flow

    def timed_flow(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = flow(*args, **kwargs)
        tick()
        return out

    model._forward_flow = timed_flow
    # tokens drawn at random may be rows of the table that the tokenizer has no word for
    inferencer.tokenizer.decode = lambda ids: "<|im_start|><|im_end|>"
    picture = Image.effect_mandelbrot((work["width"], work["height"]), (-2, -1.2, 1, 1.2), 30).convert("RGB")
    shared = {
        "cfg_interval": [0.0, 1.0],
        "num_timesteps": work["steps"] + 2,
        "cfg_text_scale": 4.0,
        "timestep_shift": 3.0,
    }
    shape = {"image_shapes": (work["height"], work["width"])}
    answer = {"understanding_output": True, "do_sample": True, "text_temperature": 1000.0}
    found: dict[str, list[float]] = {name: [] for name in ("prefill", "token", "step", "edit_step", "request")}
    for repeat in range(work["repeats"] + 1):
        begun = time.perf_counter()
        drawn = stamps([work["prompt"]], cfg_img_scale=1.0, **shape, **shared)
        request = time.perf_counter() - begun
        edited = stamps([picture, work["prompt"]], cfg_img_scale=1.5, **shared)
        hook = model.language_model.lm_head.register_forward_hook(tick)
        told = stamps([picture, work["prompt"]], max_think_token_n=work["tokens"] + 2, **answer)
        hook.remove()
        if repeat:
            found["step"] += drawn[1:]
            found["edit_step"] += edited[1:]
            found["prefill"].append(told[0])
            found["token"] += told[1:]
            found["request"].append(request)
    return found


class NoAutocast(contextlib.nullcontext):
    """The official code asks for bfloat16 autocast whatever its weights are."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


def main() -> None:
    job = json.loads(sys.argv[1])
    device = torch.device(job["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, job["dtype"] or ("bfloat16" if device.type == "cuda" else "float32"))
    begun = time.perf_counter()
    inferencer = load(job["official"], job["source"], device, dtype)
    taken = time.perf_counter() - begun
    if dtype == torch.float32:
        torch.autocast = torch.amp.autocast = NoAutocast
        torch.bfloat16 = torch.float32  # to which it casts pictures and noise by name
    elif device.type == "cpu":  # it names CUDA
        original = torch.autocast
        torch.autocast = torch.amp.autocast = lambda *_, **options: original("cpu", dtype=options.get("dtype"))
    found = figures(inferencer, job["work"], device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    elif (status := Path("/proc/self/status")).exists():  # getrusage counts what the parent held when it started this
        peak = 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"load": [taken], **found, "peak": peak}))


if __name__ == "__main__":
    main()
