"""Export recipes: what to export, for where. One TOML file each."""

import dataclasses
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """Arguments of `bagel_opt.export.export`, under the same names; profiles by name or file."""

    format: str
    profiles: list[str]
    dtype: str = "float32"
    attention: str = "auto"
    device: str = "cpu"


def load_recipe(source: str | Path) -> Recipe:
    """Reads a recipe from a TOML file, or by the name of one in export/, which is installed with the package.

    Raises FileNotFoundError where there is neither and ValueError where a field is missing, unknown or bad. What the
    fields may hold, the export checks.
    """
    path = Path(source)
    if not path.is_file():
        path = recipes_folder() / f"{source}.toml"
    if not path.is_file():
        names = sorted(path.stem for path in recipes_folder().glob("*.toml"))
        raise FileNotFoundError(f"recipe {str(source)!r} is neither a file nor one of: {', '.join(names)}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    fields = [field.name for field in dataclasses.fields(Recipe)]
    for what, names in (("unknown", set(data) - set(fields)), ("missing", {"format", "profiles"} - set(data))):
        if names:
            raise ValueError(f"{path}: {what} field {', '.join(sorted(names))}; a recipe has {', '.join(fields)}")
    recipe = Recipe(**data)
    if not isinstance(recipe.profiles, list) or not all(isinstance(name, str) for name in recipe.profiles):
        raise ValueError(f"{path}: profiles is {recipe.profiles!r}; it must be a list of names or files")
    return recipe


def recipes_folder() -> Path:
    """export/: inside the installed package as recipes/, or beside it in a checkout."""
    installed = Path(str(resources.files("bagel_opt"))) / "recipes"
    return installed if installed.is_dir() else installed.parent.parent / "export"
