"""Comparing a bundle with the eager model it was made from: every program on random inputs, then whole requests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bagel_opt.api import Model
from bagel_opt.errors import BundleError, ProfileError
from bagel_opt.files.adapters import Loras
from bagel_opt.files.manifest import MANIFEST, UNFINISHED, read_manifest
from bagel_opt.images import resized
from bagel_opt.loading import load, load_bundle
from bagel_opt.programs.exercise import run_programs
from bagel_opt.quantization import kinds_of_products

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}  # relative
ROUNDED = 0.2  # where what comes into products is rounded too, by which sums of another order differ


def verify(
    bundle: str | Path,
    checkpoint: str | Path | None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    unfinished: bool = False,
    weights: str | Path | None = None,
    lora: Loras = (),
) -> dict[str, float]:
    """The largest relative error of each program's outputs and caches against eager float32, and of whole requests.

    unfinished: the bundle is not in its place yet. weights, lora: what went over the checkpoint. Raises BundleError where an error exceeds the tolerance of the
    bundle's dtype, and what `load` raises. Takes the memory of both models.
    """
    name = UNFINISHED if unfinished else MANIFEST
    manifest = read_manifest(Path(bundle), name)
    ours = load_bundle(Path(bundle), name=name)
    given = {"weights": weights, "lora": lora, "quantization": manifest.quantization}
    eager = load(checkpoint, device="cpu", dtype="float32", **given)
    products = kinds_of_products(manifest.quantization)
    rounded = products if manifest.kind == "onnx" else products & {"fp8", "int8"}
    allowed, errors = max(TOLERANCE[manifest.dtype], ROUNDED if rounded else 0.0), {}
    for profile in ours.profiles:
        runs = [run_programs(model.runtime.for_profile(profile), model.config, profile) for model in (eager, ours)]
        for done, ((name, want), (_, got)) in enumerate(zip(*runs, strict=True)):
            progress(f"verifying {name}", done + 1, len(runs[0]))
            errors[name] = max(errors.get(name, 0.0), _largest(got, want), key=_nan_last)
    for name, inputs, options in _requests(ours):
        if name == "answering" and allowed > TOLERANCE["float32"]:
            continue  # rounding may choose another token, and all that follow are then other ones
        progress(f"verifying {name}", 1, 1)
        try:
            got = _watched(ours, inputs, options)
        except ProfileError:  # the profile is not for such requests
            continue
        errors[name] = _largest(got, _watched(eager, inputs, options))
    # `not <=` rather than `>`, which NaN would pass
    if wrong := {name: error for name, error in errors.items() if not error <= allowed}:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise BundleError(f"{bundle} differs from the eager model by more than {allowed:g}: {listed}; do not use it")
    return errors


def _nan_last(error: float) -> float:
    return np.inf if np.isnan(error) else error


def _largest(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """NaN where any is: Python's max would lose it."""
    return float(np.max([relative(a, b) for a, b in zip(got, want, strict=True)], initial=0.0))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Bytes of a picture may be rounded the other way."""
    if want.dtype == np.uint8:
        off = np.abs(got.astype(int) - want)
        return float(np.where(off <= 1, 0, off).max()) / 255
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9))


def _requests(model: Model) -> list[tuple[str, list, dict]]:
    """Small requests: name, inputs, options."""
    side, films = 2 * model.config.token_pixels, model.config.longest > 1
    width, height = (side, side) if films else resized((side, side), model.config.vae_resize)
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    small = {"height": side, "width": side}
    reading = {"resolution_vae": side, "resolution_vit": 2 * side} if films else {}
    film = {"output": "video", "num_timesteps": 4, "num_frames": 5, **small}
    return [
        ("drawing", ["a red circle"], {"num_timesteps": 4, **small}),
        ("editing", [picture, "make it green"], {"num_timesteps": 4, **reading}),
        ("answering", [picture, "what is it?"], {"output": "text", "max_think_tokens": 8, **reading}),
        *([("filming", ["a red ball rolls"], film)] if films else []),
    ]


def _watched(model: Model, inputs: list, options: dict) -> list[np.ndarray]:
    """Guided velocities and pictures, or tokens, of a request."""
    seen: list[np.ndarray] = []
    outputs = model.run(
        inputs,
        seed=0,
        on_step=lambda event: seen.append(np.asarray(event.v_t)),
        on_token=lambda token: seen.append(np.array([token + 1])),
        **options,
    )
    pictures = [picture for x in outputs for picture in (x if isinstance(x, list) else [x])]
    return seen + [np.asarray(picture) for picture in pictures if isinstance(picture, Image.Image)]
