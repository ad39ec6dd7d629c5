"""Programs as torch.export archives or AOTInductor packages, in parts, with the weights as inputs."""

import dataclasses
import gc
import io
import logging
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_unflatten

from bagel_opt.export.examples import example_inputs, free_sides, profile_to_trace
from bagel_opt.export.given import Given
from bagel_opt.export.parts import Functional, Part, cut
from bagel_opt.export.processes import ProcessDiedError, in_processes
from bagel_opt.model.mixture import Mixture
from bagel_opt.profile import Profile
from bagel_opt.programs.callables import programs
from bagel_opt.programs.signatures import ROW, Signature, signatures
from bagel_opt.runtime.torch_bundle import open_package

UNLOADABLE = (
    f"torch {torch.__version__} cannot load what the C++ compiler here makes, as happens where it links the C++ standard library "
    "statically: give another compiler as CXX, or take --format export, which needs none"
)


def export_part(part: Part) -> tuple[torch.export.ExportedProgram, list[str]]:
    """(graph, names of the parameters it takes): traced with those that a first run has a use for, and again where the
    graph has none for some of them."""
    parameters = dict(part.owner.named_parameters())
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Given() as given:
        part.call(*part.inputs)
    used = [name for name, parameter in parameters.items() if id(parameter) in given.ids]
    while True:
        weights = tuple(parameters[name].detach() for name in used)
        shapes = (part.free, (None,) * len(weights)) if part.free else None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.export(
                Functional(part, used), (part.inputs, weights), dynamic_shapes=shapes, strict=False
            )
        given = graph.graph_signature.user_inputs  # others are constants of the code
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder" and node.name in given]
        placeholders = placeholders[len(part.inputs) :]
        left = [name for name, node in zip(used, placeholders, strict=True) if node.users]
        if left == used:
            return graph, used
        used = left


def name_in_bundle(part: Part, parameter: str) -> str:
    return part.prefix + parameter.removeprefix("model.")  # a program may hold the model as its part


def compile_file(path: str) -> None:
    """Replaces a torch.export archive by an AOTInductor package: the library alone, without sources and symbols, which
    are three quarters of it."""
    from torch._inductor.package import package_aoti

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # there is a process for each core already
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.load(path)
        values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        fakes = [values[name] for name in program.graph_signature.user_inputs]  # no memory is needed to compile
        inputs, keywords = tree_unflatten(fakes, program.call_spec.in_spec)
        files = torch._inductor.aot_compile(
            program.module(check_guards=False), inputs, keywords, options={"aot_inductor.package": True}
        )
        kept = [file for file in files if not str(file).endswith(".cpp")]
        if strip := shutil.which("strip"):
            subprocess.run([strip, *(file for file in kept if str(file).endswith(".so"))], check=True)
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                if str(file).endswith(".wrapper.cpp"):  # torch 2.11 finds the metadata by this name
                    kept.append(str(Path(folder) / Path(file).name))
                    Path(kept[-1]).touch()
            written = io.BytesIO()  # as in _export
            package_aoti(written, kept)
            Path(path).write_bytes(written.getbuffer())
    check_loads(path, inputs[0][0].device)


def check_loads(path: str, device: torch.device) -> None:
    """Loads a package once. Some of what cannot be loaded ends the process: the compiler's, then, not a user's."""
    try:
        open_package(path, device)
    except RuntimeError as error:
        raise ChildProcessError(f"{path}: {UNLOADABLE} ({str(error).splitlines()[0]})") from None


def export_packaged(
    model: Mixture, profiles: Sequence[Profile], folder: Path, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, dict]]:
    """Writes the parts of programs to folder/NAME.ROLE.pt2 as torch.export archives, once for all profiles, since their sizes
    are free but for the rows of some. -> each profile's programs, as the manifest has them"""
    calls, traced, known = programs(model), profile_to_trace(model.config, _sides(model)), {}
    found: dict[str, dict[str, dict]] = {}
    for profile in profiles:
        wanted, found[profile.name] = signatures(model.config, profile), {}
        for done, (name, signature) in enumerate(wanted.items()):
            rows, base = _rows(name, profile), name.removesuffix(ROW)
            file = f"{base}-{rows}" if rows else base
            if file not in known:
                progress(f"exporting {file}", done, len(wanted))
                shapes = signatures(model.config, dataclasses.replace(traced, rows=rows or traced.rows))[base]
                known[file] = _export(model, file, base, calls[base], shapes, traced, folder)
            found[profile.name][name] = {"parts": known[file], **dataclasses.asdict(signature)}
        progress("exported", len(wanted), len(wanted))
    return found


def _rows(name: str, profile: Profile) -> int | None:
    """How many rows a program has; None is any number. "step" has inputs for each batch, of which there is one from three rows
    on. Scans of any number of rows are none that torch 2.11 can compile for a GPU."""
    if name.startswith("choose"):
        return 1 if name.endswith(ROW) else profile.rows
    return profile.rows if name == "step" and profile.batches > 1 else None


def _sides(model: Mixture) -> set[int]:
    return {side for tensor in (*model.parameters(), *model.buffers()) for side in tensor.shape}


def _export(
    model: Mixture, file: str, name: str, call: Callable, signature: Signature, traced: Profile, folder: Path
) -> dict[str, dict]:
    """A program's parts, by role: the file, and the weights that it takes. file: what files' names begin with."""
    inputs, caches, free = example_inputs(model.config, signature, traced, model.dtype, model.device)
    sides = frozenset() if name.startswith("vae") else free_sides(traced)
    parts = {}
    with torch.no_grad():
        cuts = list(cut(model, name, call, tuple(inputs), caches, tuple(free), sides))
    for part in cuts:
        graph, used = export_part(part)
        part_file = f"{file}.{part.role}.pt2"
        graph.example_inputs = None  # it would be saved, weights and all
        written = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(graph, written)
        (folder / part_file).write_bytes(written.getbuffer())
        parts[part.role] = {"file": part_file, "weights": [name_in_bundle(part, parameter) for parameter in used]}
    return parts


def compile_files(_: None, paths: list[str]) -> Iterator[str]:
    """Compiles archives one after another, in a process of its own."""
    for path in paths:
        compile_file(path)
        yield path


def compile_all(folder: Path, progress: Callable[[str, int, int], None]) -> None:
    """Compiles every archive of a folder, as many at a time as there are cores, of which each needs some memory of a
    GPU. Raises ChildProcessError where a process dies or torch cannot load what it made."""
    gc.collect()
    torch.cuda.empty_cache()
    files = sorted(str(path) for path in folder.glob("*.pt2"))
    try:
        with closing(in_processes(f"{__name__}:compile_files", None, files, most=16)) as compiled:
            for done, _ in enumerate(compiled):
                progress("compiling", done + 1, len(files))
    except ProcessDiedError as error:
        reason = f"a process that compiles its programs died, for want of memory, or {UNLOADABLE}"
        raise ChildProcessError(f"{folder}: {reason} ({str(error).splitlines()[0]})") from None
