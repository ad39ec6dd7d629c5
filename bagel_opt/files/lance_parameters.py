"""The names and shapes of the weights that Lance has and BAGEL has not: see parameters.py."""

from bagel_opt.lance.config import QwenViTConfig, WanConfig

Shapes = dict[str, tuple[int, ...]]
FOLDED = 12  # channels of 2 x 2 pixels


def vit_shapes(c: QwenViTConfig, channels: int) -> Shapes:
    """channels: of the transformer."""
    hidden, wide = c.hidden_size, c.spatial_merge_size**2 * c.hidden_size
    found: Shapes = {"vit_encoder.patch_embed.proj.weight": (hidden, c.patch_dim)}
    for layer in range(c.num_hidden_layers):
        at = f"vit_encoder.blocks.{layer}"
        found |= {
            f"{at}.norm1.weight": (hidden,),
            **_weight_and_bias(f"{at}.attn.qkv", 3 * hidden, hidden),
            **_weight_and_bias(f"{at}.attn.proj", hidden, hidden),
            f"{at}.norm2.weight": (hidden,),
            **_weight_and_bias(f"{at}.mlp.gate_proj", c.intermediate_size, hidden),
            **_weight_and_bias(f"{at}.mlp.up_proj", c.intermediate_size, hidden),
            **_weight_and_bias(f"{at}.mlp.down_proj", hidden, c.intermediate_size),
        }
    return {
        **found,
        "vit_encoder.merger.ln_q.weight": (hidden,),
        **_weight_and_bias("vit_encoder.merger.mlp.0", wide, wide),
        **_weight_and_bias("vit_encoder.merger.mlp.2", channels, wide),
    }


def vae_shapes(c: WanConfig) -> Shapes:
    z = c.z_channels
    return {
        **_half("encoder", "downsamples", c.encoder, c.encoder_time, c.num_res_blocks, FOLDED, 2 * z),
        **_weight_and_bias("conv1", 2 * z, 2 * z, 1, 1, 1),
        **_weight_and_bias("conv2", z, z, 1, 1, 1),
        **_half("decoder", "upsamples", c.decoder, c.decoder_time, c.num_res_blocks + 1, z, FOLDED),
    }


def _half(
    half: str, levels: str, widths: tuple[int, ...], time: tuple[bool, ...], blocks: int, c_in: int, c_out: int
) -> Shapes:
    middle = widths[-1] if half == "encoder" else widths[0]
    found = _weight_and_bias(f"{half}.conv1", widths[0], c_in, 3, 3, 3)
    for block in (0, 2):
        found |= _residual(f"{half}.middle.{block}", middle, middle)
    found |= {
        f"{half}.middle.1.norm.gamma": (middle, 1, 1),
        **_weight_and_bias(f"{half}.middle.1.to_qkv", 3 * middle, middle, 1, 1),
        **_weight_and_bias(f"{half}.middle.1.proj", middle, middle, 1, 1),
        f"{half}.head.0.gamma": (widths[-1], 1, 1, 1),
        **_weight_and_bias(f"{half}.head.2", c_out, widths[-1], 3, 3, 3),
    }
    for level, width in enumerate(widths[1:]):
        at = f"{half}.{levels}.{level}.{levels}"
        for block in range(blocks):
            found |= _residual(f"{at}.{block}", width if block else widths[level], width)
        if level < len(widths) - 2:
            found |= _weight_and_bias(f"{at}.{blocks}.resample.1", width, width, 3, 3)
            if time[level]:
                out = width if half == "encoder" else 2 * width
                found |= _weight_and_bias(f"{at}.{blocks}.time_conv", out, width, 3, 1, 1)
    return found


def _residual(name: str, c_in: int, c_out: int) -> Shapes:
    return {
        f"{name}.residual.0.gamma": (c_in, 1, 1, 1),
        **_weight_and_bias(f"{name}.residual.2", c_out, c_in, 3, 3, 3),
        f"{name}.residual.3.gamma": (c_out, 1, 1, 1),
        **_weight_and_bias(f"{name}.residual.6", c_out, c_out, 3, 3, 3),
        **(_weight_and_bias(f"{name}.shortcut", c_out, c_in, 1, 1, 1) if c_in != c_out else {}),
    }


def _weight_and_bias(name: str, c_out: int, c_in: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, *kernel), f"{name}.bias": (c_out,)}
