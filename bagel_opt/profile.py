"""Shape profiles: the static sizes that programs are built for."""

from dataclasses import dataclass
from pathlib import Path

from bagel_opt.errors import ProfileError
from bagel_opt.toml_files import names, package_folder, read_settings


@dataclass(frozen=True)
class Profile:
    """Static sizes. A request that needs more is refused; one that needs less is padded.

    rows: sequences in a batch; slots: KV slots per row, the image being drawn included; text: tokens per prefill chunk;
    patches: ViT patches of one image; latents: latent tokens of one image.
    """

    name: str
    rows: int
    slots: int
    text: int
    patches: int
    latents: int

    def __post_init__(self):
        for field in ("rows", "slots", "text", "patches", "latents"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ProfileError(
                    f"profile {self.name!r}: {field} is {value!r}; it must be a whole number of at least 1"
                )

    def cost(self) -> tuple[int, ...]:
        """Orders profiles from small to large."""
        return self.rows * self.latents, self.slots, self.patches, self.text

    @property
    def batches(self) -> int:
        """Batches of `rows` rows that together hold the three guidance branches of one request."""
        return -(-3 // self.rows)


def load_profile(source: "Profile | str | Path") -> Profile:
    """Reads a profile from a TOML file, or by the name of one in profiles/, which is installed with the package.

    Raises FileNotFoundError where there is neither and ProfileError where a field is missing, unknown or bad.
    """
    if isinstance(source, Profile):
        return source
    return read_settings(Profile, source, profiles_folder(), ProfileError)


def profiles_folder() -> Path:
    return package_folder("profiles", "profiles")


def profile_names() -> list[str]:
    return names(profiles_folder())
