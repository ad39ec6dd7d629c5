"""Settings in TOML files: a dataclass each, yours or one that is installed with the package."""

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def package_folder(installed: str, checkout: str) -> Path:
    """A folder of the installed package, or its source beside the package in a checkout."""
    inside = Path(str(resources.files("bagel_opt"))) / installed
    return inside if inside.is_dir() else inside.parent.parent / checkout


def read_settings(kind: type[T], source: str | Path, folder: Path, error: type[ValueError]) -> T:
    """Reads a `kind` from a TOML file, or by the name of one in a folder.

    Raises FileNotFoundError where there is neither, and `error` where a field is missing, unknown or bad.
    """
    what = kind.__name__.lower()
    if not isinstance(source, str | Path):
        raise error(
            f"{what} {source!r:.80} is {type(source).__name__}; allowed: a file, or one of: {', '.join(names(folder))}"
        )
    path = Path(source)
    if not path.is_file():
        path = folder / f"{source}.toml"
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(source)!r} is neither a file nor one of: {', '.join(names(folder))}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as bad:  # the latter of what is nested deeply
        raise error(f"{path} is not valid TOML: {bad}") from None
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    needed = {name for name, required in fields.items() if required}
    for problem, wrong in (("unknown", set(data) - set(fields)), ("missing", needed - set(data))):
        if wrong:
            raise error(f"{path}: {problem} field {', '.join(sorted(wrong))}; a {what} has {', '.join(fields)}")
    try:
        return kind(**data)
    except error as bad:
        raise error(f"{path}: {bad}") from None


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.toml"))
