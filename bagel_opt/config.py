"""What a BAGEL model is made of: its sizes, and the numbers that its host side needs. What cannot be raises ValueError."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from bagel_opt.limits import Range, check_number, check_numbers, real, whole
from bagel_opt.options import VIDEO, Options, check_recommended, described

# The most that any model has of something, so that a lie in a file costs no minutes and no gigabytes.
WIDEST, DEEPEST, LONGEST = 2**20, 1024, 2**24  # channels, layers, entries of a table
MAX_PIXELS = 14 * 14 * 9 * 1024  # the official transforms' limit for one image, VAE and ViT alike


@dataclass(frozen=True)
class LLMConfig:
    """The Qwen2-shaped transformer; both experts have these sizes."""

    hidden_size: int = whole(1, WIDEST)
    intermediate_size: int = whole(1, WIDEST)
    num_hidden_layers: int = whole(1, DEEPEST)
    num_attention_heads: int = whole(1, WIDEST)
    num_key_value_heads: int = whole(1, WIDEST)
    vocab_size: int = whole(1, LONGEST)
    rope_theta: float = real(1e-6, 1e15, 1e6)
    rms_norm_eps: float = real(1e-15, 1, 1e-6)

    def __post_init__(self):
        check_numbers(self)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"head counts do not divide: {self}")
        if self.head_dim % 2:  # channels are rotated in pairs
            raise ValueError(f"heads have {self.head_dim} channels, which must be even: {self}")

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

    hidden_size: int = whole(1, WIDEST)
    intermediate_size: int = whole(1, WIDEST)
    num_hidden_layers: int = whole(0, DEEPEST)
    num_attention_heads: int = whole(1, WIDEST)
    patch_size: int = whole(1, 1024)
    num_positions: int = whole(1, LONGEST)
    num_channels: int = whole(1, 16, 3)
    layer_norm_eps: float = real(1e-15, 1, 1e-6)

    def __post_init__(self):
        check_numbers(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"head counts do not divide: {self}")

    @property
    def places(self) -> int:
        """How many there are for patches."""
        return self.num_positions

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class VAEConfig:
    """The FLUX autoencoder; the defaults are the published model's."""

    ch: int = whole(32, 4096, 128)
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = whole(1, 64, 2)
    z_channels: int = whole(1, 1024, 16)
    scale_factor: float = real(1e-6, 1e6, 0.3611)
    shift_factor: float = real(-1e6, 1e6, 0.1159)

    def __post_init__(self):
        check_numbers(self)
        if self.ch % 32:
            raise ValueError(f"ch is {self.ch}; it must be a multiple of the 32 groups that are normed together")
        if not isinstance(self.ch_mult, tuple) or not 1 <= len(self.ch_mult) <= 8:
            raise ValueError(f"ch_mult is {self.ch_mult!r:.60}; it must be 1 to 8 whole numbers")
        for number in self.ch_mult:
            check_number("ch_mult", number, Range(1, 64))

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    def encoding(self, pixels: int) -> int:
        """Numbers that are alive at the widest place."""
        return 3 * pixels * self.ch

    def decoding(self, pixels: int) -> int:
        """The same: in the last blocks, a block's input and two more of its size, the first two with the level below's channels."""
        return pixels * self.ch * (2 * max(self.ch_mult[:2]) + 1)

    def held(self, pixels: int) -> int:
        """Numbers that are kept from one part of a video to the next: there are no videos."""
        return 0

    @property
    def widths(self) -> str:
        return f"{self.ch} x {list(self.ch_mult)}"


@dataclass(frozen=True)
class ResizeConfig:
    """Limits of an input image's sides in pixels; both sides become multiples of `stride`."""

    max_size: int = whole(1, 2**16)
    min_size: int = whole(1, 2**16)
    stride: int = whole(1, 2**16)

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of <|im_start|>, <|im_end|>, <|vision_start|> and <|vision_end|>, in the official names."""

    bos_token_id: int = whole(0, LONGEST)
    eos_token_id: int = whole(0, LONGEST)
    start_of_image: int = whole(0, LONGEST)
    end_of_image: int = whole(0, LONGEST)

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class BagelConfig:
    """Everything about a model that its programs and its host side need, besides the weights.

    generation: options that the model recommends, which count where a request gives none.
    """

    family: ClassVar[str] = "bagel"
    draws: ClassVar[tuple[str, ...]] = ("image", "interleaved")
    llm: LLMConfig
    vit: ViTConfig
    vae: VAEConfig
    vae_resize: ResizeConfig
    vit_resize: ResizeConfig
    special: SpecialTokens
    latent_side: int = whole(1, 4096)  # side of the square table of latent positions
    vit_side: int = whole(1, 4096)  # side of the square table of ViT positions
    latent_patch_size: int = whole(1, 64, 2)
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_numbers(self)
        try:
            check_recommended(self.generation)
        except ValueError as error:
            raise ValueError(f"generation: {error}") from None
        if (top := max(asdict(self.special).values())) >= self.llm.vocab_size:
            raise ValueError(f"special token {top} is none of a vocabulary of {self.llm.vocab_size}")

    @property
    def without(self) -> frozenset[str]:
        """Options of other models."""
        return frozenset(described(VIDEO))

    @property
    def latent_dim(self) -> int:
        """Channels of one latent token."""
        return self.vae.z_channels * self.latent_patch_size**2

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one latent token covers."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def largest_size(self) -> int:
        """Side of a picture as far as the position table reaches."""
        return self.latent_side * self.token_pixels

    @property
    def default_size(self) -> int:
        """Side of a picture when none is asked for."""
        return min(1024, self.largest_size)

    @property
    def longest(self) -> int:
        """Frames of a video."""
        return 1

    @property
    def places(self) -> int:
        """How many there are for latent tokens."""
        return self.latent_side**2

    @property
    def vit_in_layers(self) -> bool:
        """Whether bundles have one layer of the ViT for all: they take the same."""
        return True

    @property
    def vit_joins(self) -> int:
        """How many patches are one embedding; 0 where each is its own, and all of a picture are encoded at once."""
        return 0

    @property
    def rope_sections(self) -> tuple[int, ...]:
        """Of the rotary frequencies, where positions have several axes."""
        return ()

    def position_shape(self, tokens: int) -> tuple[int, ...]:
        """Of a row's positions of an image block: it shares one."""
        return ()

    def time_shape(self, tokens: int) -> tuple[int, ...]:
        """Of a row's flow times: its tokens share one."""
        return ()

    def reading(self, options: Options) -> "BagelConfig":
        """This, with the sides of input images that a request asks for."""

        def limits(kind: str, own: ResizeConfig) -> ResizeConfig:
            sides = {side: getattr(options, f"{kind}_{side}") for side in ("max_size", "min_size")}
            return replace(own, **{side: value for side, value in sides.items() if value is not None})

        return replace(self, vae_resize=limits("vae", self.vae_resize), vit_resize=limits("vit", self.vit_resize))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping) -> "BagelConfig":
        """Of what `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""
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
