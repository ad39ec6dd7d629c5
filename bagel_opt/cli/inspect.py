"""Tables of what a checkpoint or a bundle holds."""

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from rich.table import Table

from bagel_opt.cli.memory import plan_tables
from bagel_opt.files.adapters import Loras
from bagel_opt.files.finding import find_bundle, find_place
from bagel_opt.files.manifest import WEIGHTS, read_manifest
from bagel_opt.files.weights import locate_weights
from bagel_opt.lance.config import Config
from bagel_opt.loading import shipped_model
from bagel_opt.profile import Profile, load_profile
from bagel_opt.quantization import Quantization, kinds_of_parts
from bagel_opt.runtime.bundle_check import check_bundle
from bagel_opt.runtime.memory_plan import bytes_of_parts, make_plan, needs, size_text
from bagel_opt.sampling.default_profile import default_profile

PARTS = {
    "_moe_gen": "generation expert",
    ".language_model.": "understanding expert, embeddings",
    ".vit_model.": "ViT",
    ".vae.": "VAE",
    "": "connectors, positions, time",
}


def look(
    source: str | Path | None,
    profiles: Sequence[str] = (),
    dtype: str | None = None,
    check: bool = True,
    weights: str | Path | None = None,
    lora: Loras = (),
    memory: "str | int | None" = None,
    quantization: Quantization | None = None,
) -> list[Table]:
    """Tables on anything that people have: what it is, and what it lacks to be loaded, or what `describe` says. Raises what
    `describe` raises for what is none of the known forms, or not whole."""
    given = (source, profiles, dtype, check, weights, lora, memory, quantization)
    if source is None or weights or lora or find_bundle(source):
        return describe(*given)
    try:
        from bagel_opt.files.forms import recognise
        from bagel_opt.files.lance import find_transformer
    except ImportError:
        return describe(*given)  # which says what is missing
    place = find_place(source)
    if find_transformer(place):
        return describe(*given)
    form = recognise(place)
    table = _table(f"{place}", "", "")
    table.add_row("what it is", form.what)
    if form.tensors:
        table.add_row("tensors", form.size)
    table.add_row("what it lacks", "\n".join(form.lacks) or "nothing")
    if form.arguments:
        table.add_row("to use it", f'bagel-opt generate "a red fox" {shlex.join(form.arguments)}')
    return [table] if form.lacks else [table, *describe(*given)]


def describe(
    source: str | Path | None,
    profiles: Sequence[str] = (),
    dtype: str | None = None,
    check: bool = True,
    weights: str | Path | None = None,
    lora: Loras = (),
    memory: "str | int | None" = None,
    quantization: Quantization | None = None,
) -> list[Table]:
    """Tables on a checkpoint folder, a repo id or a bundle, and on the memory that profiles need: those given, in dtype,
    or a bundle's own; dtype None is float32. check: compare a bundle's files with their sha256. weights, lora, quantization:
    as `load` takes them. memory: of a GPU, for which plans are shown, in bfloat16 where there is no dtype. Raises what `load`
    raises, and ValueError for what a bundle does not take."""
    source = shipped_model() if source is None else source
    if find_bundle(source):
        if profiles or dtype or weights or lora or quantization:
            raise ValueError(
                f"{source} is a bundle, whose profiles, dtype and weights were fixed when it was exported; leave them out"
            )
        if memory:
            raise ValueError(f"{source} is a bundle, which keeps all its weights on the GPU; plan for its checkpoint")
        return _bundle(find_place(source), check)
    chosen = [load_profile(name) for name in profiles]
    kinds = kinds_of_parts(quantization)
    return _checkpoint(source, chosen, dtype or ("bfloat16" if memory else "float32"), weights, lora, memory, kinds)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _bundle(folder: Path, check: bool) -> list[Table]:
    manifest = read_manifest(folder)
    check_bundle(folder, manifest, digests=check)
    total = sum(entry["size"] for entry in manifest.files.values())
    about = _table(f"bundle {folder}", "", "")
    for row in (("kind", manifest.kind), ("dtype", manifest.dtype), ("size", size_text(total))):
        about.add_row(*row)
    for part, kind in manifest.quantization.items():
        about.add_row(f"{part} in", kind)
    for profile in manifest.profiles:
        for name, value in vars(profile).items():
            about.add_row(f"profile {name}", str(value))
    if manifest.machine:
        about.add_row("compiled for", manifest.machine)
    for what, found in (("made with", manifest.versions), ("tried with", manifest.tried)):
        told = ", ".join(value if name == "machine" else f"{name} {value}" for name, value in found.items())
        about.add_row(what, told or "not recorded; export with --verify")
    programs = _table("programs", "program", "size", "inputs", "outputs")
    for name, entry in manifest.programs[manifest.profiles[-1].name].items():
        inputs = [f"{key} {_shape(shape)} {kind}" for key, (shape, kind) in entry["inputs"].items()]
        outputs = list(entry["outputs"])
        if entry["cache_rows"]:
            layers = manifest.config.llm.num_hidden_layers
            note = f"caches of {entry['cache_rows']} rows, {layers} layers"
            inputs.append(note)
            outputs.append(note)
        files = {part["file"] for part in (entry, *entry.get("parts", {}).values()) if "file" in part}
        size = size_text(sum(manifest.files[file]["size"] for file in files)) if files else "in cache/"
        programs.add_row(name, size, "\n".join(inputs), "\n".join(outputs))
    held = sum(place.length for place in locate_weights(folder / WEIGHTS).values())
    memory = _memory(manifest.config, manifest.profiles, manifest.dtype, held)
    return [about, programs, _config(manifest.config), memory]


def _memory(
    config: Config,
    profiles: list[Profile],
    dtype: str,
    weights: int,
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    table = _table(f"memory in {dtype}", "profile", "weights", "caches", "workspace, about", "together")
    for profile in profiles:
        needed = needs(config, profile, dtype, weights, kinds)
        table.add_row(profile.name, *map(size_text, (*needed.values(), sum(needed.values()))))
    return table


def _checkpoint(
    source: str | Path,
    profiles: list[Profile],
    dtype: str,
    weights: str | Path | None,
    lora: Loras,
    memory: "str | int | None",
    kinds: Mapping[str, str],
) -> list[Table]:
    try:
        from bagel_opt.files.checkpoint import Checkpoint
    except ImportError as error:
        raise ImportError(
            f"{source} is a checkpoint, which needs {error.name}: pip install 'bagel-opt[torch]'"
        ) from None

    checkpoint = Checkpoint(source, weights, lora)
    parameters, dtypes, size = Counter(), defaultdict(set), Counter()
    for name, place in checkpoint.tensors.items():
        part = next(label for key, label in PARTS.items() if key in f".{name}")
        parameters[part] += math.prod(place.shape)
        dtypes[part].add(place.dtype.safetensors)
        size[part] += place.length
    table = _table(f"checkpoint {checkpoint.about}", "part", "parameters", "dtype", "size")
    for part in PARTS.values():
        table.add_row(part, f"{parameters[part]:,}", ", ".join(sorted(dtypes[part])), size_text(size[part]))
    table.add_section()
    table.add_row("together", f"{parameters.total():,}", "", size_text(size.total()))
    chosen = _table("files", "")
    for note in (*checkpoint.notes, *map(str, checkpoint.adapters)):
        chosen.add_row(note)
    tables = [table, *([chosen] if chosen.row_count else []), _config(checkpoint.config)]
    config, kinds = checkpoint.config, kinds or checkpoint.kinds
    if profiles:
        held = sum(bytes_of_parts(config, dtype, kinds).values())
        tables.append(_memory(config, profiles, dtype, held, kinds))
    for profile in (profiles or [default_profile(config)]) if memory else ():
        tables += plan_tables(make_plan(config, memory, profile, dtype, kinds), profile)
    return tables


def _config(c: Config) -> Table:
    table = _table("model", "", "")
    heads = f"{c.llm.num_attention_heads} heads on {c.llm.num_key_value_heads} of {c.llm.head_dim} channels"
    rows = {
        "transformer": f"{c.llm.num_hidden_layers} layers of {c.llm.hidden_size}, MLP {c.llm.intermediate_size}, {heads}",
        "vocabulary": f"{c.llm.vocab_size}",
        "ViT": f"{c.vit.num_hidden_layers} layers of {c.vit.hidden_size}, patches of {c.vit.patch_size} pixels",
        "VAE": f"{c.vae.z_channels} channels, 1/{c.vae.downsample} of the side, widths {c.vae.widths}",
        "largest picture": f"{c.largest_size} x {c.largest_size} pixels",
        **({"longest video": f"{c.longest} frames"} if c.longest > 1 else {}),
        "cache per slot": f"{2 * c.llm.num_hidden_layers * c.llm.num_key_value_heads * c.llm.head_dim:,} numbers",
    }
    rows |= {f"recommended {name}": str(value) for name, value in c.generation.items()}
    for row in rows.items():
        table.add_row(*row)
    return table


def _shape(shape: list) -> str:
    return "x".join(str(side) for side in shape)
