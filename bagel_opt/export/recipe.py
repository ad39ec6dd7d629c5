"""Export recipes: what to export, for where. One TOML file each."""

from dataclasses import dataclass
from pathlib import Path

from bagel_opt.quantization import Quantization, kinds_of_parts
from bagel_opt.toml_files import names, package_folder, read_settings


@dataclass(frozen=True)
class Recipe:
    """Arguments of `bagel_opt.export.export`, under the same names, which also says what they may be; profiles by name
    or file."""

    format: str
    profiles: list[str]
    dtype: str = "float32"
    attention: str = "auto"
    device: str = "cpu"
    quantization: Quantization | None = None

    def __post_init__(self):
        for name in ("format", "dtype", "attention", "device"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r}; it must be a text")
        kinds_of_parts(self.quantization)
        given = self.profiles
        if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
            raise ValueError(f"profiles is {given!r}; it must be a list of names or files, at least one")


def load_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a TOML file, or by the name of one in export/, which is installed with the package.

    Raises FileNotFoundError where there is neither and ValueError where a field is missing, unknown or bad.
    """
    return read_settings(Recipe, source, recipes_folder(), ValueError)


def recipe_names() -> list[str]:
    return names(recipes_folder())


def recipes_folder() -> Path:
    return package_folder("recipes", "export")
