"""Shape profiles: the static sizes that programs are built for."""

from dataclasses import dataclass
from pathlib import Path

from bagel_opt.errors import ProfileError
from bagel_opt.limits import check_numbers, whole
from bagel_opt.toml_files import names, package_folder, read_settings


@dataclass(frozen=True)
class Profile:
    """Static sizes. A request that needs more is refused; one that needs less is padded.

    rows: sequences in a batch; slots: KV slots per row, the image being drawn included; text: tokens per prefill chunk;
    patches: ViT patches of one image; latents: latent tokens of one image.
    """

    name: str
    rows: int = whole(1, 4096)
    slots: int = whole(1, 2**24)
    text: int = whole(1, 2**24)
    patches: int = whole(1, 2**24)
    latents: int = whole(1, 2**24)

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ProfileError(f"name is {self.name!r:.60}; it must be a text")
        try:
            check_numbers(self)
        except ValueError as error:
            raise ProfileError(f"profile {self.name!r:.60}: {error}") from None

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
