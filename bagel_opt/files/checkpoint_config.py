"""A checkpoint's sizes, read from its JSON files and its tensor shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_opt.config import BagelConfig, LLMConfig, ResizeConfig, SpecialTokens, VAEConfig, ViTConfig
from bagel_opt.errors import CheckpointError
from bagel_opt.json_files import read_json
from bagel_opt.limits import Range, check_number
from bagel_opt.options import check_recommended

COUNT = Range(1, 2**31)
LATENT_SIDE = 64  # of the published model's table of positions


def read_config(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], special: SpecialTokens, given: Mapping[str, dict] = {}
) -> BagelConfig:
    """Reads the configuration of a checkpoint folder.

    shapes: every tensor's shape by its published name. The sides of the position tables come from there, since
    config.json's `max_latent_size` is stale in the published checkpoint. given: JSON files by name that count in place of
    those in the folder.
    Raises FileNotFoundError for a missing file and CheckpointError for a missing or impossible field.
    """
    try:
        return _config(_Files(folder, given), shapes, special)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def read_generation(*places: Path) -> dict[str, Any]:
    """The options that models recommend: `generation` in their config.json; of several folders, the later ones' count.
    Raises CheckpointError naming the file where there is anything else."""
    found: dict[str, Any] = {}
    for path in (place / "config.json" for place in places):
        table = _read_json(path).get("generation", {}) if path.is_file() else {}
        try:
            check_recommended(table)
        except ValueError as error:
            raise CheckpointError(f"{path}: generation: {error!s:.600}") from None
        found |= table
    return found


@dataclass(frozen=True)
class _Files:
    """JSON files by name."""

    folder: Path
    given: Mapping[str, dict]

    def has(self, name: str) -> bool:
        return name in self.given or (self.folder / name).exists()

    def read(self, name: str) -> dict:
        """What is given of a part of the model counts whole; of files on several parts, the fields that it has."""
        given, path = self.given.get(name), self.folder / name
        if given is None or (name in ("config.json", "preprocessor_config.json") and path.exists()):
            return _read_json(path) | (given or {})
        return given


def _config(files: _Files, shapes: Mapping[str, tuple[int, ...]], special: SpecialTokens) -> BagelConfig:
    """Raises ValueError too, which does not name the folder."""
    folder = files.folder
    # Without config.json the official code's own two files do.
    top = {} if not files.has("config.json") and files.has("llm_config.json") else files.read("config.json")
    llm = _section(files, top, "llm_config")
    vit = _section(files, top, "vit_config")
    vae = _read_vae(folder, top.get("vae_config") or {}, shapes)
    prep = files.read("preprocessor_config.json") if files.has("preprocessor_config.json") else {}
    llm_config = LLMConfig(
        hidden_size=_whole(llm, "hidden_size"),
        intermediate_size=_whole(llm, "intermediate_size"),
        num_hidden_layers=_whole(llm, "num_hidden_layers"),
        num_attention_heads=_whole(llm, "num_attention_heads"),
        num_key_value_heads=_whole(llm, "num_key_value_heads"),
        vocab_size=_whole(llm, "vocab_size"),
        rope_theta=_rope_theta(folder, llm),
        rms_norm_eps=llm.get("rms_norm_eps", 1e-6),
    )
    patch = _whole(vit, "patch_size")
    vit_config = ViTConfig(
        hidden_size=_whole(vit, "hidden_size"),
        intermediate_size=_whole(vit, "intermediate_size"),
        num_hidden_layers=_whole(vit, "num_hidden_layers") - 1,
        num_attention_heads=_whole(vit, "num_attention_heads"),
        patch_size=patch,
        num_positions=(_whole(vit, "image_size") // patch) ** 2,
        num_channels=_whole(vit, "num_channels", 3),
        layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
    )
    for name, act, known in (("llm", llm, "silu"), ("vit", vit, "gelu_pytorch_tanh")):
        if act.get("hidden_act", known) != known:
            raise CheckpointError(f"{folder}: {name}_config has hidden_act {act['hidden_act']!r}; BAGEL uses {known!r}")

    def limits(kind: str, max_size: int, min_size: int, stride: int) -> ResizeConfig:
        given = prep.get(kind)
        if not isinstance(given, dict):  # a preprocessor_config.json of another kind
            return ResizeConfig(max_size, min_size, stride)
        return ResizeConfig(*(_whole(given, name) for name in ("max_size", "min_size", "stride")))

    return BagelConfig(
        llm=llm_config,
        vit=vit_config,
        vae=vae,
        vae_resize=limits("vae", 1024, 512, 16),
        vit_resize=limits("vit", 980, 224, 14),
        special=special,
        latent_side=_side(shapes, "latent_pos_embed.pos_embed", LATENT_SIDE),
        vit_side=_side(shapes, "vit_pos_embed.pos_embed", round(vit_config.num_positions**0.5)),
        latent_patch_size=_whole(top, "latent_patch_size", 2),
    )


def _read_vae(folder: Path, given: dict, shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """Fields that are not there have the sizes of the tensors; the published config.json has none of them."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{folder}/config.json: vae_config holds {type(given).__name__}, not an object of fields")
    fixed = {"downsample", "resolution", "in_channels", "out_ch"}  # follow from the others, or never vary
    if unknown := set(given) - {*VAEConfig.__dataclass_fields__, *fixed}:
        raise CheckpointError(f"{folder}/config.json: unknown fields in vae_config: {', '.join(sorted(unknown))}")
    fields = {name: value for name, value in given.items() if name not in fixed}
    if isinstance(fields.get("ch_mult"), list):
        fields["ch_mult"] = tuple(fields["ch_mult"])
    return VAEConfig(**{**_vae_sizes(shapes), **fields})


def _vae_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    widths, blocks = [], 0
    while shape := shapes.get(f"vae.encoder.down.{len(widths)}.block.0.conv1.weight"):
        widths.append(shape[0])
    while f"vae.encoder.down.0.block.{blocks}.conv1.weight" in shapes:
        blocks += 1
    first, latent = (shapes.get(f"vae.{name}.conv_in.weight", ()) for name in ("encoder", "decoder"))
    if not widths or len(first) != 4 or len(latent) != 4 or any(width % first[0] for width in widths):
        return {}
    mult = tuple(width // first[0] for width in widths)
    return {"ch": first[0], "ch_mult": mult, "num_res_blocks": blocks, "z_channels": latent[1]}


def _whole(section: Mapping, field: str, default: int | None = None) -> int:
    value = section.get(field, default)
    if value is None:
        raise ValueError(f"the model configuration lacks {field!r}")
    check_number(field, value, COUNT)
    return value


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a BAGEL checkpoint folder has it beside its weights")
    data = read_json(path, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not an object of fields")
    return data


def _section(files: _Files, top: dict, name: str) -> dict:
    """The official code reads NAME.json; config.json repeats it for those who ship one file."""
    if files.has(f"{name}.json") or not isinstance(top.get(name), dict):
        return files.read(f"{name}.json")
    return top[name]


def _rope_theta(folder: Path, llm: dict) -> float:
    """transformers from 5 on writes it into an object of its own, where version 4 does not find it."""
    rope = llm.get("rope_parameters") or {}
    if not isinstance(rope, dict) or llm.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{folder}: llm_config asks for rope_scaling, which BAGEL does not use")
    return llm.get("rope_theta", rope.get("rope_theta", 10000.0))


def _side(shapes: Mapping[str, tuple[int, ...]], name: str, default: int) -> int:
    """Of a table of positions. default: where the file has none, since it is fixed."""
    if name not in shapes:
        return default
    rows = shapes[name][0] if shapes[name] else 0
    side = round(rows**0.5)
    if side < 1 or side**2 != rows:
        raise ValueError(f"{name} has {rows} rows, which is no square table of positions")
    return side
