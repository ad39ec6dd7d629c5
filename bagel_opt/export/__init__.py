"""Writing bundles."""

import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from bagel_opt.bundle import MANIFEST, TOKENIZER, WEIGHTS, Manifest, list_files, locate_weights, read_manifest
from bagel_opt.errors import BundleError
from bagel_opt.profile import Profile, load_profile

FORMATS = ("onnx",)
DTYPES = ("float32", "float16")
LIBRARIES = ("bagel-opt", "torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "tokenizers")


def export(
    checkpoint: str | Path | None,
    out: str | Path,
    profile: Profile | str | Path,
    *,
    format: str = "onnx",
    dtype: str = "float32",
    verify: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Writes a bundle of a checkpoint (None: the model that ships) to the folder `out` and returns it.

    It is written under another name and moved into place when whole. `out` may be empty, absent or an older bundle,
    which is then replaced. verify: compare the bundle with eager float32 before it is moved into place, and raise
    BundleError where it differs. progress(what, done, total). Raises ValueError for a bad argument, FileExistsError where
    `out` holds something else, and what `load` raises for the checkpoint.
    """
    for name, value, allowed in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")
    out, profile = Path(out).resolve(), load_profile(profile)
    if out.exists() and not _replaceable(out):
        raise FileExistsError(f"{out} exists and is no bundle; choose another folder or remove it")

    try:
        import onnxscript  # noqa: F401
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"exporting needs {error.name}: pip install 'bagel-opt[export]'") from None

    from bagel_opt.api import shipped_model
    from bagel_opt.checkpoint import Checkpoint
    from bagel_opt.export.onnx import export_onnx

    source = Checkpoint(shipped_model() if checkpoint is None else checkpoint)
    kind = getattr(torch, dtype)
    model = source.load(torch.device("cpu"), kind, lambda done, total: progress("loading", done, total))
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(dict(model.named_parameters()), partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)  # it comes readable by its owner alone
        shutil.copyfile(source.folder / "tokenizer.json", partial / TOKENIZER)
        weights = locate_weights(partial / WEIGHTS)
        programs = export_onnx(model, profile, partial, weights, kind, progress)
        manifest = Manifest(
            kind=format,
            dtype=dtype,
            profile=profile,
            config=source.config,
            programs=programs,
            versions={name: _version(name) for name in LIBRARIES},
            files=list_files(partial),
        )
        manifest.write(partial)
        if verify:
            from bagel_opt.export.verify import verify as compare

            compare(partial, source.folder, progress)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _replaceable(out: Path) -> bool:
    """Whether a folder is empty, or a bundle with nothing in it that an export did not write."""
    if not out.is_dir():
        return False
    inside = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    try:
        return not inside or inside == {MANIFEST, *read_manifest(out).files}
    except (BundleError, FileNotFoundError):
        return False


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
