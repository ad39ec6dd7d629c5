"""The names and shapes of a model's weights, from its sizes alone and without torch: what a checkpoint and a bundle have to
hold, compared before anything is built from either."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

from bagel_opt.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from bagel_opt.files.lance_parameters import vae_shapes, vit_shapes
from bagel_opt.files.weights import Location
from bagel_opt.lance.config import Config
from bagel_opt.quantization import BLOCK, KINDS

Shapes = dict[str, tuple[int, ...]]
TOKENS = "llm.embed.weight"
PARTS = {
    "und": r"llm\.layers\.\d+\.und\.",
    "gen": r"llm\.layers\.\d+\.gen\.",
    "vit": r"vit_encoder\.(layers|blocks)\.",
    "head": r"llm\.lm_head\.",
    "embeddings": r"llm\.embed\.",
}


def parameter_shapes(c: Config) -> Shapes:
    """The parameters of the model of these sizes."""
    hidden = c.llm.hidden_size
    lance = c.family == "lance"
    vae = vae_shapes(c.vae) if lance else _vae(c.vae)
    return {
        **_llm(c.llm),
        **(vit_shapes(c.vit, hidden) if lance else _bagel(c)),
        **_linear("time.fc1", hidden, 256),
        **_linear("time.fc2", hidden, hidden),
        **_linear("latent_in", hidden, c.latent_dim),
        **_linear("latent_out", c.latent_dim, hidden),
        **{f"vae.{name}": shape for name, shape in vae.items()},
    }


def quantized_shapes(parameters: Shapes, kinds: Mapping[str, str]) -> Shapes:
    """The parameters after `Bagel.quantize`: codes and scales in place of the weights of those parts."""
    found: Shapes = {}
    for name, shape in parameters.items():
        kind = kind_of(name, shape, kinds)
        if kind is None:
            found[name] = shape
        else:
            stem = name.removesuffix("weight")
            found |= zip((f"{stem}quantized.codes", f"{stem}quantized.scale"), KINDS[kind].shapes(shape), strict=True)
    return found


def stored_dtypes(parameters: Shapes, kinds: Mapping[str, str], onnx: str = "") -> dict[str, str]:
    """Of the codes and the scales among parameters after `Bagel.quantize`. onnx: the device that an ONNX bundle with these is
    for. For the CPU it then has the table of tokens in 16 bits, and for CUDA the scales of products in the model's dtype."""
    found = {TOKENS: "bfloat16"} if onnx == "cpu" and kinds else {}
    for name in parameters:
        if ".quantized." not in name:
            continue
        kind, is_codes = KINDS[kinds[part_of(name)]], name.endswith(".codes")
        if onnx == "cuda" and part_of(name) != "embeddings":
            found |= {name: "uint8"} if is_codes else {}
        else:
            found[name] = kind.codes if is_codes else kind.scale
    return found


def kind_of(name: str, shape: tuple[int, ...], kinds: Mapping[str, str]) -> str | None:
    """In which a parameter of `Bagel` is stored, where these parts are quantised; None: as it is."""
    return kinds.get(part_of(name)) if len(shape) == 2 else None


def part_of(name: str) -> str:
    """Of quantization.PARTS, or an empty text."""
    return next((part for part, names in PARTS.items() if re.match(names, name)), "")


def stored_shapes(c: Config, kind: str, device: str, kinds: Mapping[str, str]) -> Shapes:
    """The weights in a bundle of that kind for that device, as its exporter writes them (for ONNX, export/onnx.py). kinds:
    of the parts that are quantised."""
    if kind != "onnx":
        return quantized_shapes(parameter_shapes(c), kinds)
    queries, found = c.llm.hidden_size, {}
    for name, (rows, *rest) in parameter_shapes(c).items():
        stem, _, last = name.rpartition(".")
        parts = {name: rows}
        if stem.endswith(".gate_up"):
            parts = {f"{stem}.gate.{last}": rows // 2, f"{stem}.up.{last}": rows // 2}
        elif device == "cuda" and stem.startswith("llm.") and stem.endswith(".qkv"):
            parts = {f"{stem}.q.{last}": queries, f"{stem}.kv.{last}": rows - queries}
        product = len(rest) == 1 and not name.endswith(("embed.weight", "position.weight"))
        for part, count in parts.items():
            if coded := kind_of(name, (rows, *rest), kinds):
                found |= zip(
                    (f"{part.removesuffix('weight')}quantized.{of}" for of in ("codes", "scale")),
                    in_onnx(coded, device, count, *rest) if product else KINDS[coded].shapes((count, *rest)),
                    strict=True,
                )
                continue
            found[part] = (*rest, count) if product and device == "cpu" else (count, *rest)
    return found


def in_onnx(kind: str, device: str, rows: int, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a product's codes and scales (export/onnx_quantized.py)."""
    group = KINDS[kind].group
    if device == "cpu" and not group:
        return (channels, rows), (rows,)
    groups = -(-channels // (group or BLOCK))
    return (rows, groups, group // 2 or BLOCK), (rows * groups,)


def compare(
    where: Path | str,
    have: Mapping[str, Location],
    want: Shapes,
    dtypes: Collection[str],
    error: type[ValueError],
    fixed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raises `error` listing how the tensors in files differ from those that a model has. dtypes: which they may have;
    fixed: those of some, which may have no others."""
    both = [name for name in want if name in have]
    wrong = {
        "missing": [name for name in want if name not in have],
        "surplus": [name for name in have if name not in want],
        "mis-shaped": [
            f"{name} is {list(have[name].shape)}, not {list(want[name])}"
            for name in both
            if have[name].shape != want[name]
        ],
        f"not of {' or '.join(dtypes)}": [
            f"{name} is {have[name].dtype.name}"
            for name in both
            if name not in fixed and have[name].dtype.name not in dtypes
        ],
        "not of their kind": [
            f"{name} is {have[name].dtype.name}, not {fixed[name]}"
            for name in both
            if name in fixed and have[name].dtype.name != fixed[name]
        ],
    }
    if any(wrong.values()):
        raise error(f"{where}: " + "; ".join(_listed(kind, names) for kind, names in wrong.items() if names))


def _listed(kind: str, names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    listed = ", ".join(f"{name:.200}" for name in names[:limit])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {kind}: {listed}{more}"


# ---- the parts of a model


def _llm(c: LLMConfig) -> Shapes:
    hidden, keys = c.hidden_size, c.num_key_value_heads * c.head_dim
    found: Shapes = {"llm.embed.weight": (c.vocab_size, hidden)}
    for layer in range(c.num_hidden_layers):
        for expert in ("und", "gen"):
            at = f"llm.layers.{layer}.{expert}"
            found |= {
                f"{at}.norm1.weight": (hidden,),
                **_linear(f"{at}.qkv", hidden + 2 * keys, hidden),
                f"{at}.q_norm.weight": (c.head_dim,),
                f"{at}.k_norm.weight": (c.head_dim,),
                f"{at}.o.weight": (hidden, hidden),
                f"{at}.norm2.weight": (hidden,),
                f"{at}.gate_up.weight": (2 * c.intermediate_size, hidden),
                f"{at}.down.weight": (hidden, c.intermediate_size),
            }
    return {
        **found,
        "llm.norm_und.weight": (hidden,),
        "llm.norm_gen.weight": (hidden,),
        "llm.lm_head.weight": (c.vocab_size, hidden),
    }


def _bagel(c: BagelConfig) -> Shapes:
    hidden = c.llm.hidden_size
    return {
        **_vit(c.vit),
        **_linear("connector.fc1", hidden, c.vit.hidden_size),
        **_linear("connector.fc2", hidden, hidden),
        "vit_position.weight": (c.vit_side**2, hidden),
        "latent_position.weight": (c.latent_side**2, hidden),
    }


def _vit(c: ViTConfig) -> Shapes:
    hidden = c.hidden_size
    found = {
        **_linear("vit_encoder.patch", hidden, c.patch_dim),
        "vit_encoder.position.weight": (c.num_positions, hidden),
        **_norm("vit_encoder.norm", hidden),
    }
    for layer in range(c.num_hidden_layers):
        at = f"vit_encoder.layers.{layer}"
        found |= {
            **_norm(f"{at}.norm1", hidden),
            **_linear(f"{at}.qkv", 3 * hidden, hidden),
            **_linear(f"{at}.out", hidden, hidden),
            **_norm(f"{at}.norm2", hidden),
            **_linear(f"{at}.fc1", c.intermediate_size, hidden),
            **_linear(f"{at}.fc2", hidden, c.intermediate_size),
        }
    return found


def _vae(c: VAEConfig) -> Shapes:
    widths = [c.ch * m for m in c.ch_mult]
    top, last = widths[-1], len(widths) - 1
    found = {**_conv("encoder.conv_in", c.ch, 3), **_conv("decoder.conv_in", top, c.z_channels)}
    for half, channels, out in (("encoder", top, 2 * c.z_channels), ("decoder", widths[0], 3)):
        found |= {
            **_resnet(f"{half}.mid.block_1", top, top),
            **_norm(f"{half}.mid.attn_1.norm", top),
            **_resnet(f"{half}.mid.block_2", top, top),
            **_norm(f"{half}.norm_out", channels),
            **_conv(f"{half}.conv_out", out, channels),
        }
        for name in ("q", "k", "v", "proj_out"):
            found |= _conv(f"{half}.mid.attn_1.{name}", top, top, 1)
    for level, width in enumerate(widths):
        entering = {"encoder.down": widths[level - 1] if level else c.ch, "decoder.up": widths[min(level + 1, last)]}
        for side, c_in in entering.items():
            for block in range(c.num_res_blocks + (side == "decoder.up")):
                found |= _resnet(f"{side}.{level}.block.{block}", width if block else c_in, width)
        if level != last:
            found |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
        if level:
            found |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    return found


def _resnet(name: str, c_in: int, c_out: int) -> Shapes:
    return {
        **_norm(f"{name}.norm1", c_in),
        **_conv(f"{name}.conv1", c_out, c_in),
        **_norm(f"{name}.norm2", c_out),
        **_conv(f"{name}.conv2", c_out, c_out),
        **(_conv(f"{name}.nin_shortcut", c_out, c_in, 1) if c_in != c_out else {}),
    }


def _linear(name: str, c_out: int, c_in: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}


def _conv(name: str, c_out: int, c_in: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, side, side), f"{name}.bias": (c_out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
