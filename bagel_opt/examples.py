"""What a model's folder gives to try it with: examples.json, and the picture that it names.

    {"prompts": ["...", "...", "..."], "picture": "example.png", "edit": "...", "question": "..."}

All of it is optional, in a checkpoint and in a bundle. What is damaged or strange is ignored, with a line in the log.
"""

import io
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from bagel_opt.errors import shown
from bagel_opt.images import to_rgb
from bagel_opt.json_files import read_json

EXAMPLES = "examples.json"
PROMPTS, CHARACTERS, PIXELS, BYTES = 3, 500, 2**22, 2**16  # at most: prompts; of one text, the picture, the file
log = logging.getLogger("bagel_opt")


@dataclass(frozen=True)
class Examples:
    """prompts: to draw; edit and question: of `picture`, a PNG file's bytes, or of any picture where it is None. The
    defaults are for a BAGEL that knows photographs."""

    prompts: tuple[str, ...] = (
        "A red fox in fresh snow at sunrise, telephoto photograph, shallow depth of field",
        "A cozy bookshop on a rainy evening, warm light in the windows, reflections on the cobblestones",
        "A bowl of ramen with a soft-boiled egg on a dark wooden table, seen from above, food photography",
    )
    picture: bytes | None = None
    edit: str = "Turn it into a watercolor painting"
    question: str = "What is in this picture?"


def read_examples(folder: Path) -> Examples:
    """The examples of a checkpoint or bundle; the defaults where there are none or none that can be used."""
    return _read_or_log(folder)[0]


def copy_examples(source: Path, folder: Path) -> None:
    """Copies a checkpoint's examples into a bundle, where there are any that can be used."""
    for name in _read_or_log(source)[1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _read_or_log(folder: Path) -> tuple[Examples, list[str]]:
    """The examples and the files that they are in."""
    try:
        if (folder / EXAMPLES).exists():
            return _read(folder)
    except Exception as error:  # no file that is there for show may stop a server; Pillow raises many kinds
        why = shown(" ".join(str(error).split())) or type(error).__name__
        log.warning("%s is ignored: %s", folder / EXAMPLES, why)
    return Examples(), []


def _read(folder: Path) -> tuple[Examples, list[str]]:
    if (folder / EXAMPLES).stat().st_size > BYTES:
        raise ValueError(f"it is longer than {BYTES} bytes")
    data = read_json(folder / EXAMPLES, ValueError)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    prompts, texts = data.get("prompts"), {name: data[name] for name in ("edit", "question") if name in data}
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= PROMPTS:
        raise ValueError(f'"prompts" must be a list of up to {PROMPTS} texts')
    for text in (*prompts, *texts.values()):
        if not isinstance(text, str) or not 1 <= len(text.strip()) <= CHARACTERS:
            raise ValueError(f"{text!r:.60} is no text of 1 to {CHARACTERS} characters")
        text.encode()  # half of a surrogate pair raises UnicodeEncodeError
    if "picture" not in data:
        return Examples(tuple(prompts), **texts), [EXAMPLES]
    return Examples(tuple(prompts), _picture(folder, data["picture"]), **texts), [EXAMPLES, data["picture"]]


def _picture(folder: Path, name: object) -> bytes:
    """The picture as a PNG file. Its name may not lead out of the folder; its file may be a link, as those are that the
    Hugging Face hub keeps."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError('"picture" must be the name of a file')
    if PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute() or ".." in PureWindowsPath(name).parts:
        raise ValueError(f'"picture" {name!r:.60} leads out of the folder')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(folder / name, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{name:.60} has more than {PIXELS} pixels")
            found, file = to_rgb(image), io.BytesIO()
    found.save(file, "png")
    return file.getvalue()
