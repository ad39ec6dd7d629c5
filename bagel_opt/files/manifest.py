"""A bundle on disk: a folder with manifest.json, programs, tokenizer and the weights once.

manifest.json         see manifest.schema.json
weights.safetensors   every parameter once, under its name in bagel_opt
tokenizer.json
examples.json         and the picture that it names, where the checkpoint has them (bagel_opt/examples.py)
NAME.onnx             of an ONNX bundle: graphs whose weights are external data inside weights.safetensors
NAME.ROLE.pt2         of an aoti or export bundle: parts of programs (export/parts.py), whose weights are inputs
cache/                of a compile bundle what torch.compile compiled, and on a GPU kernels of FlashAttention 4 and quack-kernels

ONNX graphs are data. The programs of the other kinds are code, or become it: load only those of people you trust.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastjsonschema

from bagel_opt.errors import BundleError
from bagel_opt.json_files import parse_json, read_json
from bagel_opt.lance.config import Config, config_from
from bagel_opt.profile import Profile

FORMAT = 9
# Formats that can be read: 6 does not say what a bundle was tried with, 7 has no free sizes, and in torch's formats up to 8 products in 8
# bits are another operator.
READ = (6, 7, 8, 9)
MANIFEST, WEIGHTS, TOKENIZER, CACHE = "manifest.json", "weights.safetensors", "tokenizer.json", "cache"
UNFINISHED = "manifest.partial.json"  # what the manifest is called until the bundle is whole and in its place
SCHEMA = Path(__file__).with_name("manifest.schema.json")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. programs: by profile and name, each one's files, inputs, outputs and rows of caches.
    profiles: from small to large. versions: of the libraries that it was made with. machine: what a processor must have for
    compiled code, as words. tried: with what it was compared with eager float32, if it was. quantization: the kinds of the
    parts that are quantised (quantization.py). free_sizes: whether programs take fewer rows, tokens, patches, latents and slots
    than their inputs say, too."""

    kind: str
    dtype: str
    device: str
    attention: str
    profiles: list[Profile]
    config: Config
    programs: dict[str, dict[str, dict]]
    versions: dict[str, str]
    machine: str
    files: dict[str, dict[str, Any]]
    free_sizes: bool = False
    tried: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "kind": self.kind,
            "dtype": self.dtype,
            "device": self.device,
            "attention": self.attention,
            "profiles": [dataclasses.asdict(profile) for profile in self.profiles],
            "config": self.config.to_dict(),
            "programs": self.programs,
            "versions": self.versions,
            "machine": self.machine,
            "tried": self.tried,
            "free_sizes": self.free_sizes,
            "files": self.files,
            **({"quantization": self.quantization} if self.quantization else {}),
        }
        data["sha256"] = _digest(data)
        (folder / UNFINISHED).write_text(_dump(data), encoding="utf-8")


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Reads manifest.json and checks it by itself, but not the other files nor that programs are those of the profiles.
    Raises BundleError."""
    path = folder / name
    try:
        text = path.read_bytes()
        data = parse_json(text, path, BundleError)
        version, checksum = data["format"], data.pop("sha256")
        changed = checksum != _digest(data) or text != _dump({**data, "sha256": checksum}).encode()
    except OSError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError, RecursionError):
        raise BundleError(f"{path} is damaged; copy or export the bundle again") from None
    if version not in READ:
        todo = "upgrade it" if isinstance(version, int) and version > FORMAT else "export the bundle again"
        raise BundleError(
            f"{folder} has bundle format {version}; this bagel_opt reads {READ[0]} to {FORMAT}, so {todo}"
        )
    if changed:
        raise BundleError(f"{path} was changed after the export; copy or export the bundle again")
    if version < 9 and data.get("kind") in ("aoti", "export") and data.get("quantization"):
        raise BundleError(
            f"{folder} is a bundle of format {version} in 8 or 4 bits, whose programs ask for a product that is none any more; export the "
            "bundle again"
        )
    try:
        fastjsonschema.validate(read_json(SCHEMA, ValueError), data)
        profiles, config = [Profile(**profile) for profile in data["profiles"]], config_from(data["config"])
    except (fastjsonschema.JsonSchemaValueException, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: {error!s:.300}; export the bundle again") from None
    return Manifest(
        kind=data["kind"],
        dtype=data["dtype"],
        device=data["device"],
        attention=data["attention"],
        profiles=profiles,
        config=config,
        programs=data["programs"],
        versions=data["versions"],
        machine=data["machine"],
        files=data["files"],
        free_sizes=data.get("free_sizes", False),
        tried=data.get("tried", {}),
        quantization=data.get("quantization", {}),
    )


def check_files(
    folder: Path,
    manifest: Manifest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    digests: bool = True,
) -> None:
    """Compares every file with its size and sha256 in the manifest. progress(done, total) is called in files.

    digests: False looks at sizes alone, where reading huge files would take too long. Raises BundleError naming the file.
    """
    wanted = {WEIGHTS, TOKENIZER}
    for program in (entry for entries in manifest.programs.values() for entry in entries.values()):
        wanted |= {part["file"] for part in (program, *program.get("parts", {}).values()) if "file" in part}
    if unknown := wanted - set(manifest.files):
        raise BundleError(
            f"{folder}: the manifest has no sha256 of {', '.join(sorted(unknown))}; export the bundle again"
        )
    for done, (name, entry) in enumerate(manifest.files.items()):
        path = folder / name
        try:
            inside, there = _inside(folder, name), path.is_file()
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
            inside = there = False
        if not inside:
            raise BundleError(f"{path} leads outside the bundle; copy or export the bundle again")
        if not there:
            raise BundleError(f"{path} is missing; copy or export the bundle again")
        if path.stat().st_size != entry["size"] or (digests and file_digest(path) != entry["sha256"]):
            raise BundleError(f"{path} was changed or truncated after the export; copy or export the bundle again")
        progress(done + 1, len(manifest.files))


def _inside(folder: Path, name: str) -> bool:
    """Whether a file's name leads to none but a bundle's own. In the Hugging Face hub's cache the files of a repo's
    snapshots are links to what it keeps as blobs, for the repo or for all: REPO/snapshots/REVISION, REPO/blobs, blobs."""
    home, target = folder.resolve(), (folder / name).resolve()
    if target.is_relative_to(home):
        return True
    repo = next((parent.parent for parent in home.parents if parent.name == "snapshots"), None)
    stores = [repo / "blobs", repo.parent / "blobs"] if repo and "--" in repo.name else []
    return ".." not in Path(name).parts and any(target.is_relative_to(store) for store in stores)


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a bundle but its manifest."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, UNFINISHED)
    }


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: dict) -> str:
    return hashlib.sha256(_dump(data).encode()).hexdigest()


def _dump(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)
