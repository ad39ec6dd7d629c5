"""A checkpoint's sizes, read from its JSON files and its tensor shapes."""

import json
from collections.abc import Mapping
from pathlib import Path

from bagel_opt.config import BagelConfig, LLMConfig, ResizeConfig, SpecialTokens, VAEConfig, ViTConfig
from bagel_opt.errors import CheckpointError


def read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]], special: SpecialTokens) -> BagelConfig:
    """Reads the configuration of a checkpoint folder.

    shapes: every tensor's shape by its published name. The sides of the position tables come from there, since
    config.json's `max_latent_size` is stale in the published checkpoint.
    Raises FileNotFoundError for a missing file and CheckpointError for a missing or impossible field.
    """
    top = _read_json(folder / "config.json")
    llm = _section(folder, top, "llm_config")
    vit = _section(folder, top, "vit_config")
    vae = _read_vae(folder, top.get("vae_config") or {})
    prep = _read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    llm_config = LLMConfig(
        hidden_size=_whole(folder, llm, "hidden_size"),
        intermediate_size=_whole(folder, llm, "intermediate_size"),
        num_hidden_layers=_whole(folder, llm, "num_hidden_layers"),
        num_attention_heads=_whole(folder, llm, "num_attention_heads"),
        num_key_value_heads=_whole(folder, llm, "num_key_value_heads"),
        vocab_size=_whole(folder, llm, "vocab_size"),
        rope_theta=_number(folder, llm, "rope_theta", 10000.0),
        rms_norm_eps=_number(folder, llm, "rms_norm_eps", 1e-6),
    )
    patch = _whole(folder, vit, "patch_size")
    vit_config = ViTConfig(
        hidden_size=_whole(folder, vit, "hidden_size"),
        intermediate_size=_whole(folder, vit, "intermediate_size"),
        num_hidden_layers=_whole(folder, vit, "num_hidden_layers") - 1,
        num_attention_heads=_whole(folder, vit, "num_attention_heads"),
        patch_size=patch,
        num_positions=(_whole(folder, vit, "image_size") // patch) ** 2,
        num_channels=_whole(folder, vit, "num_channels", 3),
        layer_norm_eps=_number(folder, vit, "layer_norm_eps", 1e-6),
    )
    for name, act, known in (("llm", llm, "silu"), ("vit", vit, "gelu_pytorch_tanh")):
        if act.get("hidden_act", known) != known:
            raise CheckpointError(f"{folder}: {name}_config has hidden_act {act['hidden_act']!r}; BAGEL uses {known!r}")
    if llm.get("rope_scaling"):
        raise CheckpointError(f"{folder}: llm_config asks for rope_scaling, which BAGEL does not use")
    for part, heads in ((llm_config, llm_config.num_key_value_heads), (vit_config, vit_config.num_attention_heads)):
        if part.hidden_size % part.num_attention_heads or part.num_attention_heads % heads:
            raise CheckpointError(f"{folder}: {type(part).__name__} has head counts that do not divide: {part}")

    def limits(kind: str, max_size: int, min_size: int, stride: int) -> ResizeConfig:
        given = prep.get(kind)
        if not isinstance(given, dict):  # a preprocessor_config.json of another kind
            return ResizeConfig(max_size, min_size, stride)
        return ResizeConfig(*(_whole(folder, given, name) for name in ("max_size", "min_size", "stride")))

    return BagelConfig(
        llm=llm_config,
        vit=vit_config,
        vae=vae,
        vae_resize=limits("vae", 1024, 512, 16),
        vit_resize=limits("vit", 980, 224, 14),
        special=special,
        latent_side=_side(shapes, "latent_pos_embed.pos_embed"),
        vit_side=_side(shapes, "vit_pos_embed.pos_embed"),
        latent_patch_size=_whole(folder, top, "latent_patch_size", 2),
    )


def _read_vae(folder: Path, given: dict) -> VAEConfig:
    """Fields that are not there have the published model's sizes."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{folder}/config.json: vae_config holds {type(given).__name__}, not an object of fields")
    fixed = {"downsample", "resolution", "in_channels", "out_ch"}  # follow from the others, or never vary
    if unknown := set(given) - {*VAEConfig.__dataclass_fields__, *fixed}:
        raise CheckpointError(f"{folder}/config.json: unknown fields in vae_config: {', '.join(sorted(unknown))}")
    mult = given.get("ch_mult", VAEConfig.ch_mult)
    if not isinstance(mult, list | tuple) or not mult or any(type(m) is not int or m < 1 for m in mult):
        raise CheckpointError(f"{folder}: ch_mult is {mult!r}; it must be a list of whole numbers of at least 1")
    ch = _whole(folder, given, "ch", VAEConfig.ch)
    if ch % 32:
        raise CheckpointError(f"{folder}: ch is {ch}; it must be a multiple of the 32 groups that are normed together")
    shift = given.get("shift_factor", VAEConfig.shift_factor)
    if type(shift) not in (int, float):
        raise CheckpointError(f"{folder}: shift_factor is {shift!r}; it must be a number")
    return VAEConfig(
        ch=ch,
        ch_mult=tuple(mult),
        num_res_blocks=_whole(folder, given, "num_res_blocks", VAEConfig.num_res_blocks),
        z_channels=_whole(folder, given, "z_channels", VAEConfig.z_channels),
        scale_factor=_number(folder, given, "scale_factor", VAEConfig.scale_factor),
        shift_factor=shift,
    )


def _whole(folder: Path, section: Mapping, field: str, default: int | None = None) -> int:
    value = section.get(field, default)
    if value is None:
        raise CheckpointError(f"{folder}: the model configuration lacks {field!r}")
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder}: {field} is {value!r}; it must be a whole number of at least 1")
    return value


def _number(folder: Path, section: Mapping, field: str, default: float) -> float:
    value = section.get(field, default)
    if type(value) not in (int, float) or not value > 0:
        raise CheckpointError(f"{folder}: {field} is {value!r}; it must be a number above 0")
    return value


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a BAGEL checkpoint folder has it beside its weights")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not an object of fields")
    return data


def _section(folder: Path, top: dict, name: str) -> dict:
    """The official code reads NAME.json; config.json repeats it for those who ship one file."""
    if (folder / f"{name}.json").exists() or not isinstance(top.get(name), dict):
        return _read_json(folder / f"{name}.json")
    return top[name]


def _side(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in shapes:
        raise CheckpointError(f"tensor {name} is missing from the checkpoint")
    rows = shapes[name][0] if shapes[name] else 0
    side = round(rows**0.5)
    if side < 1 or side**2 != rows:
        raise CheckpointError(f"{name} has {rows} rows, which is no square table of positions")
    return side
