"""Writing a file beside its place and renaming it when it is whole."""

import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write a file under, with the same ending, that then takes the place of `path`. Where that fails, as on
    a full disk, what was there stays, and nothing else is left."""
    if path.exists() and not path.is_file():  # a device or a pipe, with nothing to keep
        with naming(path):
            yield path
        return
    target = path.resolve()  # a link stays one
    partial = target.with_name(f"{target.stem}.partial-{secrets.token_hex(4)}{target.suffix}")
    try:
        with naming(path, partial):
            yield partial
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """In the format that the name's ending tells. It is encoded first: where part of it fits, Pillow 13 may write that and
    say nothing (findings/pillow-silent-short-writes.sh)."""
    encoded = io.BytesIO()
    picture.save(encoded, Image.registered_extensions()[path.suffix.lower()])
    with replacing(path) as partial:
        partial.write_bytes(encoded.getbuffer())


def check_place(path: Path, option: str) -> None:
    """Raises OSError where no file can be written there, before work that would be lost."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    if (not path.exists() or path.is_file()) and not os.access(folder := path.resolve().parent, os.W_OK):
        raise PermissionError(f"{option} {path}: nothing may be written to the folder {folder}")


@contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Lets errors of the system name what was to be written: that of a full disk names nothing, others name `partial`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
