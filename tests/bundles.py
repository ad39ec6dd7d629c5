"""Bundles for the tests: made once, and kept in .cache/exports for as long as nothing changes that they are made from."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import pytest
from compiling import compiled_here
from support import CHECKPOINT, ODD, ROOT
from torch._subclasses import FakeTensor

import bagel_opt
from bagel_opt import Profile
from bagel_opt.export import export, torch_packages
from bagel_opt.files import manifest as manifests
from bagel_opt.files.manifest import MANIFEST, read_manifest
from bagel_opt.loading import shipped_model
from bagel_opt.profile import load_profile
from bagel_opt.programs.signatures import NEXT, OUTPUTS, ROW, Signature, signatures

CACHE = ROOT / ".cache" / "exports"
KEPT = 60  # entries of the cache, the last used ones
ABOVE_EXPORT = ("bench", "cli", "demo", "serve")  # parts of the package that no export imports
LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers")

PROFILES = {
    CHECKPOINT: Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64),
    ODD / "checkpoint": Profile("odd", rows=3, slots=768, text=64, patches=100, latents=144),
    shipped_model(): load_profile("demo"),
}
SMALL = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)
ONE = Profile("one", rows=1, slots=160, text=16, patches=16, latents=16)
ALIKE = (*OUTPUTS, *(name + NEXT for name in OUTPUTS), "step", "choose", "taylor_update", "tea_apply")  # without layers
BUNDLES = ("onnx", "aoti", "export")
BACKENDS = ("eager", "compile", *BUNDLES)


def sources() -> dict[str, Path]:
    """The files that an export's outcome depends on, the checkpoint and these tests' own helper apart."""
    package = Path(bagel_opt.__file__).parent
    found = {
        path.relative_to(package).as_posix(): path for kind in ("py", "json") for path in package.rglob(f"*.{kind}")
    }
    return {name: path for name, path in sorted(found.items()) if name.split("/")[0] not in ABOVE_EXPORT}


def key(checkpoint: Path, profiles: Sequence[Profile], **settings) -> str:
    """Of all that an export is made from."""
    digest = hashlib.sha256()
    files = {
        **sources(),
        **{
            f"checkpoint/{path.relative_to(checkpoint)}": path
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file()
        },
    }
    for name, path in {**files, "tests/bundles.py": Path(__file__)}.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    versions = {name: metadata.version(name) for name in LIBRARIES}
    digest.update(repr((versions, list(profiles), sorted(settings.items()))).encode())
    return digest.hexdigest()[:24]


def cached_export(
    checkpoint: Path, profiles: "Profile | Sequence[Profile]", name: str | None = None, **settings
) -> Path:
    """The folder of a bundle, which nobody may write to. settings: as of `export`, and programs,
    the names of those that it is to have, and compiled, of those that "aoti" is to compile, which load in `partly_compiled`.
    What tests exporting calls it itself."""
    profiles = [profiles] if isinstance(profiles, Profile) else list(profiles)
    out = place(checkpoint, profiles, name, **settings)
    with locked(out.parent):
        if not (out / MANIFEST).is_file():
            make(checkpoint, out, profiles, {**settings})
    os.utime(out.parent)
    prune()
    return out


def place(checkpoint: Path, profiles: Sequence[Profile], name: str | None = None, **settings) -> Path:
    """Where the cache has a bundle, or will."""
    out = CACHE / key(checkpoint, profiles, name=name, **settings) / (name or profiles[-1].name)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def keep(bundle: Path, checkpoint: Path, profile: Profile) -> None:
    """Puts a bundle into the cache that was exported by other means, unless it has one."""
    out = place(checkpoint, [profile], format="onnx")
    with locked(out.parent):
        if not out.exists():
            shutil.copytree(bundle, out.parent / "partial", dirs_exist_ok=True)
            (out.parent / "partial").rename(out)


def make(checkpoint: Path, out: Path, profiles: list[Profile], settings: dict) -> None:
    """Writes what is not in the cache yet; it is put in place whole."""
    programs, compiled = settings.pop("programs", ()), settings.pop("compiled", ())
    archives = CACHE / key(checkpoint, (), **{**settings, "format": "archives"})
    few = few_programs(*programs) if programs else contextlib.nullcontext()
    with few, traced_here(), traced_once(archives), compiled_here(compiled):
        export(checkpoint, out, profiles, **settings)


@contextlib.contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Exports to "export" and "aoti" take the archives of a folder meanwhile, and add those that it lacks: no archive depends
    on profiles, since its sizes are free, and the rows of those that have some are in its name."""
    trace = torch_packages._export

    def known(model: object, file: str, *given: object) -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / f"{file}.json").is_file():
                parts = trace(model, file, *given[:-1], folder)
                (folder / f"{file}.json").write_text(json.dumps(parts))
            parts = json.loads((folder / f"{file}.json").read_text())
        for part in parts.values():
            shutil.copy(folder / part["file"], given[-1])
        os.utime(folder)
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_packages, "_export", known)
        yield


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process of the tests may be at it."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def traced_here() -> Iterator[None]:
    """Exports to ONNX trace in this process meanwhile: those that they start take longer to import torch than to trace. What is
    alike for every device and precision of the layers is traced once, and lies in the cache."""
    from bagel_opt.export import onnx

    def here(_: str, common: object, tasks: list) -> Iterator:
        return onnx.write_programs(common, tasks)

    trace = onnx.trace

    def known(shapes: object, name: str, call: Callable, signature: Signature, profile: Profile) -> object:
        if name.removesuffix(ROW) not in ALIKE:
            return trace(shapes, name, call, signature, profile)
        told = repr((shapes.config, shapes.dtype, name, signature))
        folder = CACHE / key(CHECKPOINT, (), format="traces") / hashlib.sha256(told.encode()).hexdigest()[:24]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "traced.onnx"
        with locked(folder):
            if not path.is_file():
                ops, shapes.model.ops = shapes.model.ops, None  # what has a use for them is not alike
                try:
                    made = trace(shapes, name, call, signature, profile)
                finally:
                    shapes.model.ops = ops
                for value in made.graph.initializers.values():
                    if isinstance(value.const_value.raw, FakeTensor):  # a weight
                        about = {"dtype": value.dtype, "shape": value.shape, "name": value.name}
                        value.const_value = ir.ExternalTensor("weights", 0, 0, **about)
                ir.save(made, folder / "partial.onnx")
                (folder / "partial.onnx").rename(path)
        os.utime(folder.parent)
        return ir.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "in_processes", here)
        patch.setattr(onnx, "trace", known)
        yield


@contextlib.contextmanager
def few_programs(*names: str) -> Iterator[None]:
    """Exports have these programs alone meanwhile, and take less; and bundles of them load."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("export.bundle", "export.torch_packages", "runtime.bundle_check"):
            patch.setattr(
                f"bagel_opt.{module}.signatures",
                lambda *given: {name: one for name, one in signatures(*given).items() if name in names},
            )
        yield


def prune() -> None:
    """Removes all but the entries that were used last."""
    entries = sorted((path for path in CACHE.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in entries[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def rewrite(folder: Path, **changes) -> None:
    """Changes fields of a manifest and signs it anew, as another version of bagel_opt might have written it."""
    data = json.loads((folder / MANIFEST).read_text())
    data.pop("sha256")
    data.update(changes)
    (folder / MANIFEST).write_text(manifests._dump({**data, "sha256": manifests._digest(data)}))


def needs_compiler(what: str) -> None:
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip(f"{what} needs a C++ compiler on the CPU")


def export_quickly(ready, folder, die=None, meanwhile=lambda partial: None):
    """An export to folder/bundle whose programs are copies of another bundle's. meanwhile: called while it is written. die:
    before which renaming or removal in the folder that follows the process ends, counted from 1."""
    import bagel_opt.export.bundle as module

    manifest, steps = read_manifest(ready), None

    def write(model, profiles, partial, *_):
        nonlocal steps
        for path in ready.glob("*.pt2"):
            shutil.copy(path, partial)
        meanwhile(partial)
        steps = itertools.count(1)
        return manifest.programs

    def dying(call):
        def wrapped(path, *arguments, **options):
            if die and steps and path.is_relative_to(folder) and next(steps) == die:
                os._exit(9)
            return call(path, *arguments, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_write_programs", write)
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        return export(CHECKPOINT, folder / "bundle", manifest.profiles, format="export")
