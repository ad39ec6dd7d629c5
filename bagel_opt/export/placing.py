"""Putting a folder in its place: whole or not at all, one export at a time, and nothing lost that others put there."""

import glob
import itertools
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bagel_opt.files.manifest import MANIFEST, UNFINISHED
from bagel_opt.files.replacing import naming
from bagel_opt.json_files import read_json

OLD = "-old"  # ending of the folder that a replaced bundle is moved to


@contextmanager
def put_in_place(out: Path) -> Iterator[Path]:
    """A folder to write a bundle to, which takes the place of `out` in the last steps; where the block fails, it is gone,
    and `out` is as it was. Whatever dies at any time leaves the old bundle, the new one, or nothing that loads.

    Raises FileExistsError where `out` holds anything but a bundle, or another export to it runs. Where the bundle cannot
    be put in place once it is written, as when other files came there meanwhile, the error says where it lies instead.
    """
    with _alone(out) as partial:
        check_replaceable(out)
        with naming(out):
            partial.mkdir()
            yield partial
        _place(partial, out)


@contextmanager
def put_new(out: Path) -> Iterator[Path]:
    """A folder to write anything to, which becomes `out` in one step; where the block fails or dies, `out` is as it was.

    Raises FileExistsError where `out` is there and not empty, or another export to it runs.
    """
    with _alone(out) as partial:
        check_new(out)
        with naming(out):
            partial.mkdir()
            yield partial
        check_new(out)  # again: that took a while
        if out.exists():
            out.rmdir()  # nothing but an empty folder goes
        partial.rename(out)


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """The name of a folder to write, while no other export to `out` runs; it is gone in the end."""
    from filelock import FileLock, Timeout  # which comes with torch

    if file := next((parent for parent in out.parents if parent.is_file()), None):
        raise NotADirectoryError(f"{out} cannot be a folder: {file} is a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f"{out.name}.partial-lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FileExistsError(f"another export to {out} runs; wait for it or choose another folder") from None
    # Of its own name, since processes of an export that was killed may go on writing to theirs for a while.
    partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    try:
        _clean_up(out)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it makes a new one
        lock.release()


def check_new(out: Path) -> None:
    """Raises FileExistsError unless a folder is absent or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder or remove it")


def check_replaceable(out: Path) -> None:
    """Raises FileExistsError unless a folder is absent, empty or a bundle, also one half put in place or removed."""
    if others := _others(out):
        raise FileExistsError(
            f"{out} exists and is no bundle, or not only: no export wrote {min(others)}; choose another folder or remove it"
        )


def check_space(out: Path, needed: int) -> None:
    """Raises OSError where fewer bytes than that are free."""
    if (free := shutil.disk_usage(out.parent).free) < needed:
        raise OSError(
            f"{out}: the weights take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there; "
            "free some space or choose another folder"
        )


def _place(new: Path, out: Path) -> None:
    old = new.with_name(new.name + OLD)
    try:
        check_replaceable(out)  # again: that took a while
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        kept = next(path for n in itertools.count(1) if not (path := out.with_name(f"{out.name}.new-{n}")).exists())
        new.rename(kept)
        (kept / UNFINISHED).rename(kept / MANIFEST)
        raise type(error)(f"{error}; the new bundle is in {kept}") from None
    (out / UNFINISHED).rename(out / MANIFEST)
    if old.exists():
        _remove(old)
    if old.exists():
        raise FileExistsError(f"{out} is the new bundle; what others put into the old one meanwhile is in {old}")


def _clean_up(out: Path) -> None:
    """What exports have left that were killed: none but this one runs."""
    for left in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        if not left.name.endswith(OLD):
            shutil.rmtree(left, ignore_errors=True)
        elif out.exists():
            _remove(left)
        else:  # killed before the new one took its place
            left.rename(out)


def _remove(bundle: Path) -> None:
    """Removes of a folder what an export wrote. The manifest's other name keeps it from loading meanwhile, and from being
    taken for others' if this is killed."""
    if (bundle / MANIFEST).exists():
        (bundle / MANIFEST).rename(bundle / UNFINISHED)
    own = _own(bundle)
    with suppress(OSError):
        for name in sorted(_inside(bundle) & own, key=lambda name: name == UNFINISHED):  # the manifest last
            (bundle / name).unlink()
    for folder in sorted((path for path in bundle.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        bundle.rmdir()


def _others(folder: Path) -> set[str]:
    """What no export wrote."""
    if not folder.is_dir():
        return {folder.name} if folder.exists() else set()
    own = _own(folder)
    return _inside(folder) - own if own else {path.name for path in folder.iterdir()}


def _inside(folder: Path) -> set[str]:
    """The files, by their paths in it."""
    paths = folder.rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_symlink() or not path.is_dir()}


def _own(folder: Path) -> set[str]:
    """What a bundle's manifest lists, itself included, or nothing where there is none. Of any format version: an older
    bundle is to be exported again."""
    name = MANIFEST if (folder / MANIFEST).exists() else UNFINISHED
    try:
        manifest = read_json(folder / name, ValueError)
        return {name, *manifest["files"]} if {"format", "kind", "sha256"} <= manifest.keys() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
