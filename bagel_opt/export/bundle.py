"""Writing a bundle: what of it there is, and which programs."""

import contextlib
import dataclasses
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from bagel_opt.dtypes import DTYPES
from bagel_opt.examples import copy_examples
from bagel_opt.export.placing import check_space, put_in_place
from bagel_opt.files.adapters import Loras
from bagel_opt.files.manifest import TOKENIZER, UNFINISHED, WEIGHTS, Manifest, list_files, read_manifest
from bagel_opt.files.parameters import stored_dtypes, stored_shapes
from bagel_opt.profile import Profile, load_profile
from bagel_opt.programs.signatures import ONE_ROW, ROW, Signature, signatures
from bagel_opt.quantization import FOR_ONNX, Quantization, fits_onnx, kinds_of_parts
from bagel_opt.sampling.default_profile import default_profile
from bagel_opt.versions import check_version

if TYPE_CHECKING:
    from torch import Tensor

    from bagel_opt.export.onnx import Shapes
    from bagel_opt.model.bagel import Bagel

FORMATS = ("onnx", "aoti", "export", "compile")
ATTENTION = {"onnx": ("auto",), **dict.fromkeys(("aoti", "export"), ("auto", "sdpa", "flash"))}
log = logging.getLogger("bagel_opt")
LIBRARIES = ("bagel-opt", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "safetensors", "tokenizers")


def precisions(format: str, device: str) -> tuple[str, ...]:
    """The dtypes that a format can hold for a device."""
    if format == "onnx" and device == "cpu":
        return ("float32", "float16")  # ONNX Runtime's CPU provider has no bfloat16
    return ("float32", "bfloat16", "float16")


def check_settings(format: str = "onnx", dtype: str = "float32", attention: str = "auto", device: str = "cpu") -> None:
    """Raises ValueError, naming the first setting of an export that is not allowed, and what is."""
    for name, value, allowed in (
        ("format", format, FORMATS),
        ("device", device, ("cpu", "cuda")),
        ("dtype", dtype, precisions(format, device)),
        ("attention", attention, ATTENTION.get(format, (attention,))),
    ):
        if value not in allowed:
            of = "" if name == "format" else f" for format={format!r}"
            of += f" on device={device!r}" if name == "dtype" and format == "onnx" else ""
            raise ValueError(f"{name}={value!r}; allowed{of}: {', '.join(map(repr, allowed))}")


def export(
    checkpoint: str | Path | None,
    out: str | Path,
    profile: "Profile | str | Path | Sequence[Profile | str | Path] | None" = None,
    *,
    format: str = "onnx",
    dtype: str = "float32",
    attention: str = "auto",
    device: str = "cpu",
    quantization: Quantization | None = None,
    weights: str | Path | None = None,
    lora: Loras = (),
    verify: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Writes a bundle of a checkpoint (None: the model that ships) to the folder `out` and returns it.

    profile: one or several; a request takes the smallest that it fits, and all share the weights. None chooses one by the
    model's sizes (default_profile). format: "onnx", "aoti"
    (AOTInductor), "export" (torch.export) or "compile" (torch.compile with its caches). attention: as for `load`; of
    "aoti" and "export", "auto", "sdpa" or "flash"; of "onnx", "auto". device: where the bundle is to run, "cpu" or
    "cuda". quantization, weights, lora: as for `load`; ONNX takes "int8" and "int4", on
    the CPU in float32 and for CUDA in 16 bits. ONNX for CUDA can be exported without a GPU, and no export to ONNX holds more
    than one weight in memory.
    verify: compare the bundle with eager float32 before it is moved into place, and raise BundleError where it differs.
    progress(what, done, total).

    It is written under another name and moved into place when whole. `out` may be empty, absent or an older bundle,
    which is then replaced. Raises ValueError for a bad argument, FileExistsError where `out` holds something else or
    another export to it runs, OSError where the disk is full, and what `load` raises for the checkpoint.
    """
    check_settings(format, dtype, attention, device)
    onnx, kinds = format == "onnx", kinds_of_parts(quantization)
    if onnx and not fits_onnx(kinds, device, dtype):
        raise ValueError(f"quantization={quantization!r}; ONNX bundles take {FOR_ONNX}")
    out, profiles = Path(out).resolve(), None if profile is None else _profiles(profile)
    try:
        import safetensors  # noqa: F401
        import torch

        if onnx:
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting needs {error.name}: pip install 'bagel-opt[export]'") from None
    check_version("torch", torch.__version__)

    from bagel_opt.devices import check_kinds, torch_device
    from bagel_opt.files.checkpoint import Checkpoint
    from bagel_opt.loading import shipped_model
    from bagel_opt.model.attention import choose
    from bagel_opt.model.ops import TorchOps

    kind = getattr(torch, dtype)
    source = Checkpoint(shipped_model() if checkpoint is None else checkpoint, weights, lora)
    for note in source.notes:
        log.info(note)
    if onnx and not fits_onnx(source.kinds, device, dtype):
        raise ValueError(f"{source.folder} is quantised, {source.kinds}; ONNX bundles take {FOR_ONNX}")
    source.check_kinds(kinds)
    profiles, kinds = profiles or [default_profile(source.config)], kinds or source.kinds
    stored = stored_shapes(source.config, format, device, kinds)
    dtypes = stored_dtypes(stored, kinds, device if onnx else "")
    size = sum(prod(shape) * DTYPES[dtypes.get(name, dtype)].bytes for name, shape in stored.items())
    if onnx:
        from bagel_opt.export.onnx import Shapes

        shapes = Shapes(source.config, kind, device, kinds=kinds, coded=bool(source.kinds))
        parameters = ((name, torch.cat(parts)) for name, parts in source.read(shapes.plain))
    else:
        where = torch_device(device)
        check_kinds(where, kinds)
        ops, parameters = TorchOps(choose(attention, where, kind)), None

    def make() -> "Bagel | Shapes":
        if onnx:
            return shapes
        model = source.load(where, kind, lambda done, total: progress("loading", done, total), kinds)
        model.ops = ops
        return model

    with put_in_place(out) as partial:
        check_space(out, size)  # now that what killed exports left is gone
        source.tokenizer.write(partial / TOKENIZER)
        write_bundle(make, partial, format, device, profiles, progress, parameters, source.folder, kinds)
        if verify:
            from bagel_opt.export.verify import verify as compare

            compare(partial, source.folder, progress, unfinished=True, weights=weights, lora=lora)
            tried = _versions(("onnxruntime", "onnxruntime-gpu") if onnx else ("torch",))
            tried["machine"] = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
            dataclasses.replace(read_manifest(partial, UNFINISHED), tried=tried).write(partial)
    return out


def write_bundle(
    make: "Callable[[], Bagel | Shapes]",
    folder: Path,
    format: str,
    device: str,
    profiles: Sequence[Profile],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    parameters: "Iterable[tuple[str, Tensor]] | None" = None,
    examples: Path | None = None,
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the files of a bundle to a folder that has its tokenizer, and its manifest under the name UNFINISHED.

    make: the model, its attention chosen, whose memory is free again before anything is compiled ahead. profiles: from
    small to large. parameters: for ONNX, those of a `Bagel`, in its order. examples: the folder whose examples.json, if
    there is one, goes into the bundle. kinds: of the parts of the model that are quantised.
    """
    from bagel_opt.files.torch_weights import write_parameters

    model = make()
    if format == "onnx":
        attention = model.model.ops.backend
        model.write(folder / WEIGHTS, parameters)
    else:
        attention = model.ops.backend
        write_parameters(folder / WEIGHTS, model)
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    if examples is not None:
        copy_examples(examples, folder)
    programs, compiled_for = _write_programs(model, profiles, folder, format, progress), ""
    if format == "aoti":
        from bagel_opt.export.compile_cache import keep_attention_kernels
        from bagel_opt.export.torch_packages import compile_all
        from bagel_opt.runtime.torch_bundle import machine

        compiled_for = machine(model.device)
        keep_attention_kernels(model, folder)
        del model  # its memory may be what compiling wants
        compile_all(folder, progress)
    progress("sha256", 0, 0)
    Manifest(
        kind=format,
        dtype=dtype,
        device=device,
        attention=attention,
        profiles=list(profiles),
        config=config,
        programs=programs,
        versions=_versions(LIBRARIES),
        machine=compiled_for,
        files=list_files(folder),
        free_sizes=format in ("aoti", "export"),
        quantization=dict(kinds),
    ).write(folder)


def _profiles(given: "Profile | str | Path | Sequence[Profile | str | Path]") -> list[Profile]:
    """From small to large."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    profiles = [load_profile(one) for one in (given if several else [given])]
    if not profiles or len({profile.name for profile in profiles}) < len(profiles):
        raise ValueError(f"profile={given!r}; give at least one, and no name twice")
    return sorted(profiles, key=Profile.cost)


def _write_programs(
    model: "Bagel | Shapes",
    profiles: Sequence[Profile],
    folder: Path,
    format: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, dict]]:
    """Each profile's programs; where two need the same one, it is there once."""
    if format == "compile":
        from bagel_opt.export.compile_cache import warm

        warm(model, profiles, folder, progress)
        return {p.name: {n: dataclasses.asdict(s) for n, s in signatures(model.config, p).items()} for p in profiles}
    if format != "onnx":
        from bagel_opt.export.torch_packages import export_packaged

        return export_packaged(model, profiles, folder, progress)
    from bagel_opt.export.onnx import export_onnx

    free = model.device == "cpu"
    known, programs = {}, {}
    for number, profile in enumerate(profiles):
        wanted = signatures(model.config, profile)
        made = _with_free_rows(model, profile, profiles) if free else {name: (name, s) for name, s in wanted.items()}
        keys = {
            name: repr((*made[name], profile.slots if s.cache_rows and not free else 0)) for name, s in wanted.items()
        }
        missing = {as_[0]: as_[1] for name, as_ in made.items() if keys[name] not in known}
        suffix = f"-{number + 1}" if number else ""
        written = export_onnx(model, missing, suffix, profile, folder, progress)
        for name, key in keys.items():
            known.setdefault(key, written.get(made[name][0]))
        programs[profile.name] = {name: {**known[keys[name]], **dataclasses.asdict(s)} for name, s in wanted.items()}
    return programs


def _with_free_rows(
    model: "Shapes",
    profile: Profile,
    profiles: Sequence[Profile],
) -> dict[str, tuple[str, Signature]]:
    """Which program does the work of each, where some take any number of rows."""
    from bagel_opt.export.onnx_free_sizes import rows_to_trace

    rows = rows_to_trace(profiles, model.stored.values())
    many, made = signatures(model.config, dataclasses.replace(profile, rows=rows)), {}
    for name, signature in signatures(model.config, profile).items():
        base = name.removesuffix(ROW)
        made[name] = (base, many[base]) if base in ONE_ROW else (name, signature)
    return made


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
