"""BAGEL as VeOmni's SeedOmni V2 writes it: five folders, each a module with its own config.json, and BAGEL's names without
their beginnings (github.com/ByteDance-Seed/VeOmni, branch omniv2, veomni/models/seed_omni/modules/bagel/convert_model.py)."""

from pathlib import Path

from bagel_opt.config import VAEConfig
from bagel_opt.errors import CheckpointError
from bagel_opt.json_files import read_json

TEXT, MOT, VIT, FLOW, VAE = MODULES = (
    "bagel_text_encoder",
    "bagel_qwen2_mot",
    "bagel_siglip_navit",
    "bagel_flow_connector",
    "bagel_vae",
)
# What a published name begins with before the first word of the name there; nothing for other words. The VAE's is ours.
BEGINNINGS = {
    "embed_tokens": "language_model.model.",
    "lm_head": "language_model.",
    "model": "language_model.",
    "vision_model": "vit_model.",
    "encoder": "vae.",
    "decoder": "vae.",
}


def modules(place: Path) -> list[Path]:
    """Those of the five folders that are there; none where the place is something else."""
    return [place / name for name in MODULES if (place / name / "config.json").is_file()]


def check_whole(place: Path) -> None:
    """Raises FileNotFoundError for some of the five folders."""
    there = [folder.name for folder in modules(place)]
    if there and (lacks := [name for name in MODULES if name not in there]):
        raise FileNotFoundError(
            f"{place} lacks {', '.join(lacks)} of VeOmni's five folders; copy them there, or give this as weights over a whole model"
        )


def published_name(name: str) -> str:
    """Of a tensor in one of the five folders."""
    return BEGINNINGS.get(name.partition(".")[0], "") + name


def configs(place: Path) -> dict[str, dict]:
    """What the folders that are there say, as the published JSON files have it. Raises CheckpointError."""
    found: dict[str, dict] = {}
    for folder in modules(place):
        data = read_json(folder / "config.json", CheckpointError)
        if not isinstance(data, dict):
            raise CheckpointError(f"{folder / 'config.json'} holds {type(data).__name__}, not an object of fields")
        if folder.name == MOT:
            found["llm_config.json"] = data
        elif folder.name == VIT:
            layers = data.get("num_hidden_layers")  # without the last one, which the published file counts
            counted = {"num_hidden_layers": layers + 1} if isinstance(layers, int) else {}
            found["vit_config.json"] = data | counted
            _limits(found, "vit", data, "image_size", "min_image_size", "patch_size")
        elif folder.name == VAE:
            vae = {name: value for name, value in data.items() if name in VAEConfig.__dataclass_fields__}
            found.setdefault("config.json", {})["vae_config"] = vae
            _limits(found, "vae", data, "max_image_size", "min_image_size", "image_stride")
        elif folder.name == FLOW and "latent_patch_size" in data:
            found.setdefault("config.json", {})["latent_patch_size"] = data["latent_patch_size"]
    return found


def _limits(found: dict[str, dict], kind: str, data: dict, *names: str) -> None:
    """Of an input picture's sides: largest, least, and what they are multiples of."""
    if all(name in data for name in names):
        limits = dict(zip(("max_size", "min_size", "stride"), (data[name] for name in names), strict=True))
        found.setdefault("preprocessor_config.json", {})[kind] = limits
