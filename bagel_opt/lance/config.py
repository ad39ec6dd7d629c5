"""What a Lance model is made of. It offers what `BagelConfig` offers, so that whoever runs a model need not know which it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from bagel_opt.config import DEEPEST, LONGEST, WIDEST, BagelConfig, LLMConfig, SpecialTokens
from bagel_opt.limits import Range, check_number, check_numbers, whole
from bagel_opt.options import INTERLEAVING, READING, Options, check_recommended, described

# The most latent frames, and rows or columns of latents, that the official table of places has.
FRAMES, SIDE = 31, 64
PLACES = 4096  # a patch's place is row * PLACES + column
# Means and deviations of the Wan 2.2 autoencoder's 48 latent channels; its published file has none.
MEANS = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
    0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
    -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
DEVIATIONS = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454,
    0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444,
    0.4089, 0.7468, 0.7744,
)  # fmt: skip
# The official script's options where BAGEL's are others.
GENERATION = {"num_timesteps": 30, "timestep_shift": 3.5}
# What it has not, besides what is for interleaved requests and for BAGEL's reading of pictures.
FOREIGN = frozenset({"think", "think_prompt", "negative_prompt", "cfg_img_scale"})


Kept = tuple[int, int, int]  # of frames that a convolution keeps: channels, frames, and pixels to one of its


def check_whole(name: str, values: object, least: int, most: int) -> None:
    """Raises ValueError for what is no tuple of whole numbers."""
    if not isinstance(values, tuple) or len(values) > DEEPEST:
        raise ValueError(f"{name} is {values!r:.60}; it must be whole numbers")
    for value in values:
        check_number(name, value, Range(least, most))


@dataclass(frozen=True)
class QwenViTConfig:
    """The encoder of Qwen2.5-VL. window_size: in pixels. fullatt_block_indexes: the layers that see more than a window."""

    hidden_size: int = whole(1, WIDEST)
    intermediate_size: int = whole(1, WIDEST)
    num_hidden_layers: int = whole(1, DEEPEST)
    num_attention_heads: int = whole(1, WIDEST)
    patch_size: int = whole(1, 1024)
    window_size: int = whole(1, 2**16)
    tokens_per_second: int = whole(1, 1024)
    fullatt_block_indexes: tuple[int, ...] = ()
    num_channels: int = whole(1, 16, 3)
    spatial_merge_size: int = whole(1, 16, 2)
    temporal_patch_size: int = whole(1, 16, 2)

    def __post_init__(self):
        check_numbers(self)
        check_whole("fullatt_block_indexes", self.fullatt_block_indexes, 0, DEEPEST)
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(f"heads must have a multiple of 4 channels: {self}")
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(f"window_size is {self.window_size}; it must be a multiple of {self.merged_pixels} pixels")

    @property
    def places(self) -> int:
        """How many there are for patches in a row."""
        return PLACES

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_pixels(self) -> int:
        """Side of the square that one of its tokens covers."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class WanConfig:
    """The Wan 2.2 autoencoder. encoder, decoder: channels after the first convolution and after each level. encoder_time,
    decoder_time: which changes between levels change the number of frames too. num_res_blocks: of the encoder's levels; the
    decoder's have one more."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    encoder_time: tuple[bool, ...]
    decoder_time: tuple[bool, ...]
    num_res_blocks: int = whole(1, 64)
    z_channels: int = whole(1, 1024)

    def __post_init__(self):
        check_numbers(self)
        check_whole("encoder", self.encoder, 1, WIDEST)
        check_whole("decoder", self.decoder, 1, WIDEST)
        levels = len(self.encoder) - 1
        if not 1 <= levels <= 8 or len(self.decoder) != levels + 1:
            raise ValueError(f"its autoencoder has levels {self.encoder} and {self.decoder}")
        for changes in (self.encoder_time, self.decoder_time):
            if len(changes) != levels - 1 or sum(changes) != sum(self.encoder_time):
                raise ValueError(
                    f"its autoencoder changes the number of frames at {self.encoder_time}, {self.decoder_time}"
                )
        if self.z_channels != len(MEANS):
            raise ValueError(f"its autoencoder has {self.z_channels} latent channels; means are known of {len(MEANS)}")

    @property
    def downsample(self) -> int:
        """Of the sides; pixels are folded two by two first."""
        return 2 ** (len(self.encoder) - 1)

    def encoder_state(self) -> list[Kept]:
        """What is kept from part to part, in the order in which the encoder runs."""
        found, fold = [(12, 2, 2)], 2
        for level, width in enumerate(self.encoder[1:]):
            for block in range(self.num_res_blocks):
                found += [(width if block else self.encoder[level], 2, fold), (width, 2, fold)]
            if level < len(self.encoder) - 2:
                fold *= 2
                found += [(width, 1, fold)] if self.encoder_time[level] else []
        return found + [(self.encoder[-1], 2, fold)] * 5

    def decoder_state(self) -> list[Kept]:
        fold = self.downsample
        found = [(self.z_channels, 2, fold), *[(self.decoder[0], 2, fold)] * 4]
        for level, width in enumerate(self.decoder[1:]):
            for block in range(self.num_res_blocks + 1):
                found += [(width if block else self.decoder[level], 2, fold), (width, 2, fold)]
            if level < len(self.decoder) - 2:
                found += [(width, 2, fold)] if self.decoder_time[level] else []
                fold //= 2
        return [*found, (self.decoder[-1], 2, fold)]

    def encoding(self, pixels: int) -> int:
        """Numbers that are alive at the widest place, of frames of so many pixels, and what is kept for the next part, old and
        new."""
        return 2 * _numbers(self.encoder_state(), pixels) + self._working(pixels, self.encoder[:2])

    def decoding(self, pixels: int) -> int:
        return 2 * _numbers(self.decoder_state(), pixels) + self._working(pixels, self.decoder[-2:])

    def held(self, pixels: int) -> int:
        """Numbers that are kept from one part of a video to the next, while other programs may run."""
        return max(_numbers(self.encoder_state(), pixels), _numbers(self.decoder_state(), pixels))

    def _working(self, pixels: int, widest: tuple[int, ...]) -> int:
        return pixels // 4 * max(widest) * (2 * (self.frames + 2) + self.frames)

    @property
    def widths(self) -> str:
        return f"{list(self.encoder)} and {list(self.decoder)}"

    @property
    def frames(self) -> int:
        """That a latent frame stands for, but for the first, which stands for one."""
        return 2 ** sum(self.encoder_time)


def _numbers(state: list[Kept], pixels: int) -> int:
    return sum(channels * frames * pixels // fold**2 for channels, frames, fold in state)


@dataclass(frozen=True)
class LanceConfig:
    """Everything about a model that its programs and its host side need, besides the weights.

    mrope_section: frequencies of each axis. token_limit: no token from there on is ever written. draws: "image" or "video"
    where the folder has a sibling that was trained for the other, else both. generation: as in `BagelConfig`.
    """

    family: ClassVar[str] = "lance"
    llm: LLMConfig
    vit: QwenViTConfig
    vae: WanConfig
    special: SpecialTokens
    mrope_section: tuple[int, ...]
    token_limit: int = whole(1, LONGEST)
    draws: tuple[str, ...] = ("image", "video")
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_numbers(self)
        check_whole("mrope_section", self.mrope_section, 0, WIDEST)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.llm.head_dim:
            raise ValueError(f"mrope_section is {self.mrope_section}; three that add up to {self.llm.head_dim // 2}")
        try:
            check_recommended(self.generation)
        except ValueError as error:
            raise ValueError(f"generation: {error}") from None
        if (top := max(self.token_limit - 1, *asdict(self.special).values())) >= self.llm.vocab_size:
            raise ValueError(f"token {top} is none of a vocabulary of {self.llm.vocab_size}")

    @property
    def without(self) -> frozenset[str]:
        """Options of other models."""
        return FOREIGN | described(INTERLEAVING, READING).keys()

    @property
    def latent_dim(self) -> int:
        return self.vae.z_channels

    @property
    def token_pixels(self) -> int:
        return self.vae.downsample

    @property
    def default_size(self) -> int:
        """Side of a picture when none is asked for."""
        return min(768, self.largest_size)

    @property
    def largest_size(self) -> int:
        """Side of a picture as far as the table of places reaches."""
        return SIDE * self.token_pixels

    @property
    def longest(self) -> int:
        """Frames of a video."""
        return (FRAMES - 1) * self.vae.frames + 1

    @property
    def vit_joins(self) -> int:
        """How many patches are one embedding."""
        return self.vit.spatial_merge_size**2

    @property
    def vit_in_layers(self) -> bool:
        """Whether bundles have one layer of the ViT for all: some see windows, some all."""
        return False

    @property
    def places(self) -> int:
        """How many there are for latent tokens."""
        return FRAMES * SIDE**2

    @property
    def rope_sections(self) -> tuple[int, ...]:
        return self.mrope_section

    def position_shape(self, tokens: int) -> tuple[int, ...]:
        """Of a row's positions of an image block: three of each token, its markers first."""
        return 3, tokens + 2

    def time_shape(self, tokens: int) -> tuple[int, ...]:
        """Of a row's flow times: each token has its own."""
        return (tokens,)

    def reading(self, options: Options) -> "LanceConfig":
        return self

    def to_dict(self) -> dict:
        return {"family": self.family, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping) -> "LanceConfig":
        """Of what `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""

        def of(part: Mapping) -> dict:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in part.items()}

        parts = {
            "llm": LLMConfig(**data["llm"]),
            "vit": QwenViTConfig(**of(data["vit"])),
            "vae": WanConfig(**of(data["vae"])),
            "special": SpecialTokens(**data["special"]),
        }
        return cls(**{name: value for name, value in of(data).items() if name != "family"} | parts)


Config = BagelConfig | LanceConfig


def config_from(data: Mapping) -> Config:
    """Of what either's `to_dict` gave. Raises as they do."""
    return (LanceConfig if data.get("family") == LanceConfig.family else BagelConfig).from_dict(data)
