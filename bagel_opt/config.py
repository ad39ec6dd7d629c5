"""What a BAGEL model is made of: its sizes, and the numbers that its host side needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

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

    @property
    def expert_work(self) -> int:
        """Operations of one expert's products for one token."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return 2 * self.num_hidden_layers * layer


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


# BAGEL-7B-MoT, for what can be said of it without its files.
PUBLISHED = BagelConfig(
    llm=LLMConfig(3584, 18944, 28, 28, 4, 152064),
    vit=ViTConfig(1152, 4304, 26, 16, 14, 70**2),
    vae=VAEConfig(),
    vae_resize=ResizeConfig(1024, 512, 16),
    vit_resize=ResizeConfig(980, 224, 14),
    special=SpecialTokens(151644, 151645, 151652, 151653),
    latent_side=64,
    vit_side=70,
)
