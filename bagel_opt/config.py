"""What a BAGEL checkpoint is made of: sizes read from its JSON files and its tensor shapes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bagel_opt.errors import CheckpointError

MAX_PIXELS = 14 * 14 * 9 * 1024  # the official transforms' limit for one image, VAE and ViT alike


@dataclass(frozen=True)
class LLMConfig:
    """The Qwen2-shaped transformer; both experts have these sizes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ViTConfig:
    """The SigLIP encoder. `num_hidden_layers` counts the layers that run: one fewer than in vit_config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    num_positions: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class VAEConfig:
    """The FLUX autoencoder; the defaults are the published model's."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class ResizeConfig:
    """Limits of an input image's sides in pixels; both sides become multiples of `stride`."""

    max_size: int
    min_size: int
    stride: int


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of <|im_start|>, <|im_end|>, <|vision_start|> and <|vision_end|>, in the official names."""

    bos_token_id: int
    eos_token_id: int
    start_of_image: int
    end_of_image: int


@dataclass(frozen=True)
class BagelConfig:
    """Everything about a model that its programs and its host side need, besides the weights."""

    llm: LLMConfig
    vit: ViTConfig
    vae: VAEConfig
    vae_resize: ResizeConfig
    vit_resize: ResizeConfig
    special: SpecialTokens
    latent_side: int  # side of the square table of latent positions
    vit_side: int  # side of the square table of ViT positions
    latent_patch_size: int = 2

    @property
    def latent_dim(self) -> int:
        """Channels of one latent token."""
        return self.vae.z_channels * self.latent_patch_size**2

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one latent token covers."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def default_size(self) -> int:
        """Side of a picture when none is asked for: 1024, or as far as the position table reaches."""
        return min(1024, self.latent_side * self.token_pixels)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping) -> "BagelConfig":
        vae = VAEConfig(**{**data["vae"], "ch_mult": tuple(data["vae"]["ch_mult"])})
        return cls(
            **{
                **data,
                "llm": LLMConfig(**data["llm"]),
                "vit": ViTConfig(**data["vit"]),
                "vae": vae,
                "vae_resize": ResizeConfig(**data["vae_resize"]),
                "vit_resize": ResizeConfig(**data["vit_resize"]),
                "special": SpecialTokens(**data["special"]),
            }
        )


def read_config(folder: Path, shapes: Mapping[str, tuple[int, ...]], special: SpecialTokens) -> BagelConfig:
    """Reads the configuration of a checkpoint folder.

    shapes: every tensor's shape by its published name. The sides of the position tables come from there, since
    config.json's `max_latent_size` is stale in the published checkpoint.
    Raises FileNotFoundError for a missing file and CheckpointError for a missing or impossible field.
    """
    top = _read_json(folder / "config.json")
    llm = _section(folder, top, "llm_config")
    vit = _section(folder, top, "vit_config")
    vae = dict(top.get("vae_config") or {})
    prep = _read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").exists() else {}
    try:
        llm_config = LLMConfig(
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"],
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            vocab_size=llm["vocab_size"],
            rope_theta=llm.get("rope_theta", 1e6),
            rms_norm_eps=llm.get("rms_norm_eps", 1e-6),
        )
        patch = vit["patch_size"]
        vit_config = ViTConfig(
            hidden_size=vit["hidden_size"],
            intermediate_size=vit["intermediate_size"],
            num_hidden_layers=vit["num_hidden_layers"] - 1,
            num_attention_heads=vit["num_attention_heads"],
            patch_size=patch,
            num_positions=(vit["image_size"] // patch) ** 2,
            num_channels=vit.get("num_channels", 3),
            layer_norm_eps=vit.get("layer_norm_eps", 1e-6),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}: the model configuration lacks {error}") from None
    for name, act, known in (("llm", llm, "silu"), ("vit", vit, "gelu_pytorch_tanh")):
        if act.get("hidden_act", known) != known:
            raise CheckpointError(f"{folder}: {name}_config has hidden_act {act['hidden_act']!r}; BAGEL uses {known!r}")
    if llm.get("rope_scaling") or llm.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{folder}: llm_config asks for rope_scaling or tied embeddings, which BAGEL does not use"
        )
    for part, heads in ((llm_config, llm_config.num_key_value_heads), (vit_config, vit_config.num_attention_heads)):
        if part.hidden_size % part.num_attention_heads or part.num_attention_heads % heads:
            raise CheckpointError(f"{folder}: {type(part).__name__} has head counts that do not divide: {part}")
    vae.pop("downsample", None)
    if "ch_mult" in vae:
        vae["ch_mult"] = tuple(vae["ch_mult"])
    if unknown := set(vae) - set(VAEConfig.__dataclass_fields__):
        raise CheckpointError(f"{folder}/config.json: unknown fields in vae_config: {', '.join(sorted(unknown))}")

    def limits(kind: str, max_size: int, min_size: int, stride: int) -> ResizeConfig:
        given = prep.get(kind)
        return ResizeConfig(**given) if isinstance(given, dict) else ResizeConfig(max_size, min_size, stride)

    return BagelConfig(
        llm=llm_config,
        vit=vit_config,
        vae=VAEConfig(**vae),
        vae_resize=limits("vae", 1024, 512, 16),
        vit_resize=limits("vit", 980, 224, 14),
        special=special,
        latent_side=_side(shapes, "latent_pos_embed.pos_embed"),
        vit_side=_side(shapes, "vit_pos_embed.pos_embed"),
        latent_patch_size=top.get("latent_patch_size", 2),
    )


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
    side = round(shapes[name][0] ** 0.5)
    if side**2 != shapes[name][0]:
        raise CheckpointError(f"{name} has {shapes[name][0]} rows, which is no square table of positions")
    return side
