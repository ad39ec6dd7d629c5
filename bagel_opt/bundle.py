"""A bundle on disk: a folder with manifest.json, programs, tokenizer and the weights once. No torch needed to load one.

manifest.json         format version, kind, dtype, profile, model config, programs, library versions, sha256 of each file
weights.safetensors   every parameter once, under its name in bagel_opt
tokenizer.json
NAME.onnx             graphs whose weights are external data inside weights.safetensors
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bagel_opt.config import BagelConfig
from bagel_opt.errors import BundleError
from bagel_opt.profile import Profile
from bagel_opt.tokenizer import Tokenizer

FORMAT = 1
MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes are in weights.safetensors."""

    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. `programs` holds each program's file, inputs, outputs and rows of caches."""

    kind: str
    dtype: str
    profile: Profile
    config: BagelConfig
    programs: dict[str, dict]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "kind": self.kind,
            "dtype": self.dtype,
            "profile": dataclasses.asdict(self.profile),
            "config": self.config.to_dict(),
            "programs": self.programs,
            "versions": self.versions,
            "files": self.files,
        }
        data["sha256"] = _digest(data)
        (folder / MANIFEST).write_text(_dump(data), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks manifest.json, but not the other files. Raises BundleError."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        version, checksum = data["format"], data.pop("sha256")
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path} is damaged; copy or export the bundle again") from None
    if not isinstance(version, int) or version > FORMAT:
        raise BundleError(f"{folder} has bundle format {version}; this bagel_opt reads up to {FORMAT}, so upgrade it")
    if checksum != _digest(data) or text != _dump({**data, "sha256": checksum}):
        raise BundleError(f"{path} was changed after the export; copy or export the bundle again")
    return Manifest(
        kind=data["kind"],
        dtype=data["dtype"],
        profile=Profile(**data["profile"]),
        config=BagelConfig.from_dict(data["config"]),
        programs=data["programs"],
        versions=data["versions"],
        files=data["files"],
    )


def check_files(
    folder: Path, manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Compares every file with its size and sha256 in the manifest. progress(done, total) is called in files.

    Raises BundleError naming the file.
    """
    for done, (name, entry) in enumerate(manifest.files.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"{folder}: the manifest names {name}, which lies outside the bundle")
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy or export the bundle again")
        if path.stat().st_size != entry["size"] or file_digest(path) != entry["sha256"]:
            raise BundleError(f"{path} was changed or truncated after the export; copy or export the bundle again")
        progress(done + 1, len(manifest.files))


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a bundle but its manifest."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def locate_weights(path: Path) -> dict[str, Location]:
    """Byte positions of all tensors, from a safetensors file's header (https://github.com/huggingface/safetensors)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = Location(8 + length + start, end - start, entry["dtype"], tuple(entry["shape"]))
    return found


def load_bundle(folder: Path, backend: str, device: Any, progress: Callable[[int, int], None]) -> "Model":  # noqa: F821
    """Loads a bundle for `bagel_opt.load`. Raises BundleError, ValueError for a wrong backend, ImportError."""
    from bagel_opt.api import Model

    manifest = read_manifest(folder)
    if backend not in ("eager", manifest.kind):  # "eager" is what nobody asked for
        raise ValueError(f"backend={backend!r}, but {folder} is a bundle for {manifest.kind!r}; leave backend out")
    check_files(folder, manifest, progress)
    if device not in (None, "cpu") and str(device) != "cpu":
        raise ValueError(f"device={str(device)!r}; allowed for an ONNX bundle is 'cpu'")
    try:
        from bagel_opt.runtime.onnx import OnnxRuntime
    except ImportError:
        raise ImportError("an ONNX bundle needs ONNX Runtime: pip install 'bagel-opt[onnx]'") from None
    runtime = OnnxRuntime(folder, manifest)
    return Model(runtime, manifest.config, Tokenizer(folder / TOKENIZER), manifest.profile)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: dict) -> str:
    return hashlib.sha256(_dump(data).encode()).hexdigest()


def _dump(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)
