"""Checkpoints of any size with random weights, in the layout of the published BAGEL-7B-MoT.

python tests/random_checkpoint.py OUT --parameters 300M --dtype bfloat16
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
MERGES = "h e|Ġ t|Ġt he|i n|r e|o n|Ġ a|e d|Ġ c|Ġ i|Ġi s|Ġ w"  # of byte-level BPE, as in Qwen2
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of dtypes in safetensors headers
VIT = "vit_model.vision_model."

Shapes = dict[str, tuple[int, ...]]


def make(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    heads: int = 14,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int | None = None,  # heads * head_dim: the published configuration has no head_dim of its own
    mlp: int = 320,
    vocab: int = 288,
    vit_hidden: int = 32,
    vit_layers: int = 2,  # those that run; vit_config.json counts one more
    vit_heads: int = 2,
    vit_mlp: int | None = None,
    vit_patch: int = 14,
    vit_side: int = 8,
    latent_side: int = 16,
    vae_ch: int = 32,
    vae_ch_mult: tuple[int, ...] = (1, 2),
    vae_blocks: int = 1,
    z_channels: int = 16,
    shards: int = 0,  # 0: one ema.safetensors
    conv_patch: bool = False,  # the ViT's patch embedding as a 4-D convolution, of the same values
    leftovers: bool = False,  # with SigLIP's last layer and pooling head, which BAGEL does not use
) -> Path:
    """Writes a checkpoint folder. The same seed and sizes give the same values, whatever the dtype and the files."""
    if hidden not in (None, heads * head_dim):
        raise ValueError(f"hidden={hidden}; it is heads * head_dim = {heads * head_dim}")
    folder.mkdir(parents=True, exist_ok=True)
    hidden, vit_mlp = heads * head_dim, vit_mlp or 2 * vit_hidden
    shapes = {
        **llm_shapes(layers, heads, kv_heads, head_dim, mlp, vocab),
        **vit_shapes(vit_hidden, vit_layers, vit_mlp, vit_patch, vit_side),
        **other_shapes(hidden, vit_hidden, vit_side, latent_side, z_channels),
    }
    if leftovers:
        shapes |= leftover_shapes(vit_hidden, vit_layers, vit_mlp)
    generator = torch.Generator().manual_seed(seed)
    _write(folder / "ae.safetensors", vae_shapes(vae_ch, vae_ch_mult, vae_blocks, z_channels), generator, dtype)
    names = list(shapes)
    files = {"ema.safetensors": names}
    if shards:
        size = -(-len(names) // shards)
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i * size :][:size] for i in range(shards)}
        weight_map = {name: file for file, inside in files.items() for name in inside}
        _json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for file, inside in files.items():
        _write(folder / file, {name: shapes[name] for name in inside}, generator, dtype, conv_patch)

    llm = {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    vit = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vit_hidden,
        "intermediate_size": vit_mlp,
        "num_hidden_layers": vit_layers + 1,
        "num_attention_heads": vit_heads,
        "image_size": vit_side * vit_patch,
        "patch_size": vit_patch,
    }
    down = 2 ** (len(vae_ch_mult) - 1)
    vae = {
        "z_channels": z_channels,
        "downsample": down,
        "ch": vae_ch,
        "ch_mult": vae_ch_mult,
        "num_res_blocks": vae_blocks,
    }
    top = {
        "model_type": "bagel",
        "llm_config": llm,
        "vit_config": vit,
        "vae_config": vae,
        "latent_patch_size": 2,
        "max_latent_size": latent_side // 2,  # stale, as published
        "vit_max_num_patch_per_side": vit_side,
    }
    _json(folder / "config.json", top)
    _json(folder / "llm_config.json", llm)
    _json(folder / "vit_config.json", vit)
    largest = {"vae": (latent_side * 2 * down, 2 * down), "vit": (vit_side * vit_patch, vit_patch)}
    limits = {kind: {"max_size": m, "min_size": m // 4, "stride": s} for kind, (m, s) in largest.items()}
    _json(folder / "preprocessor_config.json", limits)
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_tokenizer(path: Path, specials: tuple[str, ...] = SPECIAL) -> None:
    """A byte-level BPE of 256 bytes and a few merges."""
    merges = [tuple(merge.split()) for merge in MERGES.split("|")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.model.save(str(path.parent))  # vocab.json and merges.txt, which the official code reads
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(path))


# ---- shapes by published name


def llm_shapes(layers: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int) -> Shapes:
    hidden, q, kv = heads * head_dim, heads * head_dim, kv_heads * head_dim
    shapes: Shapes = {"embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        for gen in ("", "_moe_gen"):
            part: Shapes = {f"input_layernorm{gen}.weight": (hidden,)}
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                part |= _linear(f"self_attn.{name}_proj{gen}", rows, hidden)
            part |= {f"self_attn.{name}_norm{gen}.weight": (head_dim,) for name in "qk"}
            part[f"self_attn.o_proj{gen}.weight"] = (hidden, q)
            part[f"post_attention_layernorm{gen}.weight"] = (hidden,)
            part |= {f"mlp{gen}.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
            part[f"mlp{gen}.down_proj.weight"] = (hidden, mlp)
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in part.items()}
    shapes |= {"norm.weight": (hidden,), "norm_moe_gen.weight": (hidden,)}
    return {
        **{f"language_model.model.{name}": shape for name, shape in shapes.items()},
        "language_model.lm_head.weight": (vocab, hidden),
    }


def vit_shapes(hidden: int, layers: int, mlp: int, patch: int, side: int) -> Shapes:
    return {
        **_linear(f"{VIT}embeddings.patch_embedding", hidden, 3 * patch**2),
        f"{VIT}embeddings.position_embedding.weight": (side**2, hidden),
        **{name: shape for layer in range(layers) for name, shape in _vit_layer(layer, hidden, mlp).items()},
        **_norm(f"{VIT}post_layernorm", hidden),
    }


def leftover_shapes(hidden: int, last: int, mlp: int) -> Shapes:
    return {
        **_vit_layer(last, hidden, mlp),
        f"{VIT}head.probe": (1, 1, hidden),
        f"{VIT}head.attention.in_proj_weight": (3 * hidden, hidden),
        **_linear(f"{VIT}head.mlp.fc1", mlp, hidden),
    }


def _vit_layer(layer: int, hidden: int, mlp: int) -> Shapes:
    at = f"{VIT}encoder.layers.{layer}."
    shapes = _norm(f"{at}layer_norm1", hidden)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(f"{at}self_attn.{name}", hidden, hidden)
    shapes |= _norm(f"{at}layer_norm2", hidden)
    return {**shapes, **_linear(f"{at}mlp.fc1", mlp, hidden), **_linear(f"{at}mlp.fc2", hidden, mlp)}


def other_shapes(hidden: int, vit_hidden: int, vit_side: int, latent_side: int, z_channels: int) -> Shapes:
    return {
        **_linear("connector.fc1", hidden, vit_hidden),
        **_linear("connector.fc2", hidden, hidden),
        "vit_pos_embed.pos_embed": (vit_side**2, hidden),
        "latent_pos_embed.pos_embed": (latent_side**2, hidden),
        **_linear("time_embedder.mlp.0", hidden, 256),
        **_linear("time_embedder.mlp.2", hidden, hidden),
        **_linear("vae2llm", hidden, 4 * z_channels),
        **_linear("llm2vae", 4 * z_channels, hidden),
    }


def vae_shapes(ch: int, ch_mult: tuple[int, ...], blocks: int, z_channels: int) -> Shapes:
    widths = [ch * m for m in ch_mult]
    top, last = widths[-1], len(widths) - 1
    encoder, decoder = _conv("conv_in", ch, 3), _conv("conv_in", top, z_channels)
    c = ch
    for level, width in enumerate(widths):
        for block in range(blocks):
            encoder |= _resnet(f"down.{level}.block.{block}", c, width)
            c = width
        if level != last:
            encoder |= _conv(f"down.{level}.downsample.conv", c, c)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(blocks + 1):
            decoder |= _resnet(f"up.{level}.block.{block}", c, width)
            c = width
        if level != 0:
            decoder |= _conv(f"up.{level}.upsample.conv", c, c)
    for half, width, out in ((encoder, top, 2 * z_channels), (decoder, ch, 3)):
        half |= _resnet("mid.block_1", top, top) | _resnet("mid.block_2", top, top) | _norm("mid.attn_1.norm", top)
        for name in ("q", "k", "v", "proj_out"):
            half |= _conv(f"mid.attn_1.{name}", top, top, 1)
        half |= _norm("norm_out", width) | _conv("conv_out", out, width)
    halves = {"encoder": encoder, "decoder": decoder}
    return {f"{half}.{name}": shape for half, inside in halves.items() for name, shape in inside.items()}


def _resnet(name: str, c_in: int, c_out: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", c_in) | _conv(f"{name}.conv1", c_out, c_in)
    shapes |= _norm(f"{name}.norm2", c_out) | _conv(f"{name}.conv2", c_out, c_out)
    return shapes | (_conv(f"{name}.nin_shortcut", c_out, c_in, 1) if c_in != c_out else {})


def _linear(name: str, c_out: int, c_in: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}


def _conv(name: str, c_out: int, c_in: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, side, side), f"{name}.bias": (c_out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


# ---- files


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms near 1, biases near 0, tables in [-1, 1], linear maps that keep the size of what they map."""
    if name.endswith("pos_embed"):
        return torch.rand(shape, generator=generator) * 2 - 1
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return values.mul_(0.1).add_(float(name.endswith("weight")))
    return values.mul_(math.prod(shape[1:]) ** -0.5)


def _write(
    path: Path, shapes: Shapes, generator: torch.Generator, dtype: torch.dtype, conv_patch: bool = False
) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors), one tensor in memory at a time."""
    header, offset, conv = {}, 0, f"{VIT}embeddings.patch_embedding.weight" if conv_patch else None
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        if name == conv:
            side = math.isqrt(shape[1] // 3)
            shape = (shape[0], 3, side, side)
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = _values(name, shape, generator)
            if name == conv:
                _, _, side, _ = header[name]["shape"]
                values = values.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
            file.write(memoryview(values.to(dtype).flatten().view(torch.uint8).numpy()))


def _json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


# ---- sizes for a number of parameters


def sizes_for(parameters: int) -> dict:
    """Sizes of about that many parameters that resemble BAGEL: 7 query heads to a key-value head, MLPs of 5.3 times
    the width, a layer per 128 channels, FLUX's /8 autoencoder, pictures up to 1024 x 1024."""

    def candidates() -> Iterator[tuple[float, dict]]:
        for kv_heads, head_dim in ((1, 64), (2, 64), (3, 64), (4, 64), (3, 128), (4, 128)):
            hidden = 7 * kv_heads * head_dim
            sizes = {
                "layers": hidden // 128,
                "heads": 7 * kv_heads,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "vocab": 4096,
                "vit_hidden": hidden // 7 * 2,
                "vit_heads": 2 * kv_heads,
                "vit_layers": hidden // 128 - 1,
                "vit_side": 70,
                "latent_side": 64,
                "vae_ch": 32 * min(4, max(1, hidden // 448)),
                "vae_ch_mult": (1, 2, 4, 4),
                "vae_blocks": 2,
            }
            rest = parameters - count(**sizes, mlp=0)
            mlp = round(rest / (6 * hidden * sizes["layers"]) / 16) * 16
            if mlp > 0:
                yield abs(math.log(mlp / hidden / 5.3)), {**sizes, "mlp": mlp}

    found = list(candidates())
    if not found:
        raise ValueError(f"{parameters} parameters are too few for a model that resembles BAGEL; use make's defaults")
    return min(found, key=lambda pair: pair[0])[1]


def count(
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp: int,
    vocab: int,
    vit_hidden: int,
    vit_heads: int,
    vit_layers: int,
    vit_side: int,
    latent_side: int,
    vae_ch: int,
    vae_ch_mult: tuple[int, ...],
    vae_blocks: int,
) -> int:
    parts = (
        llm_shapes(layers, heads, kv_heads, head_dim, mlp, vocab),
        vit_shapes(vit_hidden, vit_layers, 2 * vit_hidden, 14, vit_side),
        other_shapes(heads * head_dim, vit_hidden, vit_side, latent_side, 16),
        vae_shapes(vae_ch, vae_ch_mult, vae_blocks, 16),
    )
    return sum(math.prod(shape) for part in parts for shape in part.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a BAGEL checkpoint with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", help="about how many, such as 300M or 1.5B (default: make's tiny sizes)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=0)
    a = parser.parse_args()
    sizes = {}
    if a.parameters:
        number, unit = a.parameters.rstrip("kMB"), a.parameters[-1]
        sizes = sizes_for(int(float(number) * {"k": 1e3, "M": 1e6, "B": 1e9}.get(unit, 1)))
        print(f"{count(**sizes):,} parameters: {sizes}")
    print(make(a.out, dtype=getattr(torch, a.dtype), seed=a.seed, shards=a.shards, **sizes))


if __name__ == "__main__":
    main()
