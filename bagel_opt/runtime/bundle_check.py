"""What a bundle says of itself, against what its own model and profiles take: before anything is built from it."""

import dataclasses
import json
from collections.abc import Callable, Set
from pathlib import Path

from bagel_opt.errors import BundleError
from bagel_opt.files.manifest import MANIFEST, WEIGHTS, Manifest, check_files
from bagel_opt.files.parameters import compare, stored_dtypes, stored_shapes
from bagel_opt.files.weights import locate_weights
from bagel_opt.profile import Profile
from bagel_opt.programs.signatures import LAYERED, ROW, signatures
from bagel_opt.quantization import fits_onnx

# Programs in parts, and what the names of a layer's weights begin with (export/parts.py).
LAYERS = {"vit": "vit_encoder.layers.{}.", **dict.fromkeys(LAYERED, "llm.layers.{}.")}


def check_bundle(
    folder: Path,
    manifest: Manifest,
    progress: Callable[[int, int], None] = lambda done, total: None,
    digests: bool = True,
) -> None:
    """Checks what can be checked of a bundle without loading it: that its programs are those of its model and profiles, its
    files those of the manifest (`check_files`, which takes digests) and its weights those of the model. Raises BundleError."""
    stored = stored_shapes(manifest.config, manifest.kind, manifest.device, manifest.quantization)
    wrong = _wrong(manifest, stored.keys())
    if wrong:
        raise BundleError(f"{folder / MANIFEST}: {wrong}; export the bundle again")
    check_files(folder, manifest, progress, digests)
    weights = folder / WEIGHTS
    fixed = stored_dtypes(stored, manifest.quantization, manifest.device if manifest.kind == "onnx" else "")
    compare(weights, locate_weights(weights), stored, (manifest.dtype,), BundleError, fixed)


def _wrong(manifest: Manifest, weights: Set[str]) -> str | None:
    """What does not go together in a manifest. weights: the names of those in the bundle."""
    kind, dtype, names = manifest.kind, manifest.dtype, [profile.name for profile in manifest.profiles]
    if (kind == "onnx") != manifest.attention.startswith("onnx"):
        return f"attention {manifest.attention!r} is not for bundles of kind {kind!r}"
    if (kind, manifest.device, dtype) == ("onnx", "cpu", "bfloat16"):
        return "ONNX Runtime has no bfloat16 on the CPU"
    if kind == "onnx" and not fits_onnx(manifest.quantization, manifest.device, dtype):
        return f"quantization {manifest.quantization} is not for {dtype} in ONNX Runtime on {manifest.device}"
    if len(set(names)) < len(names) or set(names) != manifest.programs.keys():
        return f"there are programs for the profiles {list(manifest.programs)}, and the profiles are {names}"
    return next(filter(None, (_wrong_program(manifest, profile, weights) for profile in manifest.profiles)), None)


def _wrong_program(manifest: Manifest, profile: Profile, weights: Set[str]) -> str | None:
    wanted, entries = signatures(manifest.config, profile), manifest.programs[profile.name]
    if odd := wanted.keys() ^ entries.keys():
        return f"profile {profile.name!r} has programs missing or unknown: {', '.join(sorted(odd))}"
    for name, signature in wanted.items():
        entry, where = entries[name], f"program {name!r} of profile {profile.name!r}"
        for field, value in dataclasses.asdict(signature).items():
            if json.dumps(entry[field]) != json.dumps(value):  # as text: the order counts, and 1.0 is not 1
                return f"{field} of {where} are not those that its model and shapes ask for"
        layers = LAYERS.get(name.removesuffix(ROW)) if manifest.config.vit_in_layers or name != "vit" else None
        holds, parts, roles = {"parts"}, entry.get("parts", {}), {"start", "layer", "end"} if layers else {"whole"}
        if manifest.kind == "onnx":
            holds, parts, roles = {"file", "weights"}, {"whole": entry}, {"whole"}
        elif manifest.kind == "compile":
            holds, roles = set(), set()
        if entry.keys() - dataclasses.asdict(signature).keys() != holds or parts.keys() != roles:
            return f"{where} has not the files of one of kind {manifest.kind!r}"
        for role, part in parts.items():
            prefix, used = layers if role == "layer" else "", part["weights"]
            odd = [w for w in used if not w.startswith(prefix) or w.replace(prefix, prefix.format(0)) not in weights]
            if odd or (prefix and not used):
                return f"{role} of {where} takes weights that its model has not: {', '.join(odd) or 'none':.200}"
    return None
