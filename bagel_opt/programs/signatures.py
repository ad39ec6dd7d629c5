"""All programs by name, with their inputs and outputs: one definition for every runtime, and no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bagel_opt.lance.config import Config
from bagel_opt.profile import Profile

# What is computed for all rows of a batch, and also for a single one: "generate_row" beside "generate".
ONE_ROW = ("decode", "choose", "generate")
ROW = "_row"
# Programs that run the transformer's layers, and so have caches.
LAYERED = ("text", "vit_context", "decode", "generate")
# The VAE's programs: how many outputs they have besides what they keep for the next part of a video, which goes to the
# program of that name with NEXT after it.
OUTPUTS = {"vae_encode": 1, "vae_decode": 2}
NEXT = "_next"
# Programs of a model without caches; those of NEXT where it has them.
ALONE = ("vit", *OUTPUTS, *(name + NEXT for name in OUTPUTS))
MAX_ORDER = 6  # TaylorSeer's highest difference, as the official code sets it
STORE, REUSE = 1, 2  # what TeaCache does with a row

# A program's inputs: name -> (shape, dtype). A dimension in quotes is free; "model" is the dtype of the weights.
Inputs = dict[str, tuple[tuple[int | str, ...], str]]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a program. `cache_rows`: rows of the KV caches that follow its inputs and outputs, or 0."""

    inputs: Inputs
    outputs: tuple[str, ...]
    cache_rows: int = 0


def sized(shape: Sequence[int | str], sides: Mapping[str, int], downsample: int) -> list[int]:
    """A shape whose free dimensions have sizes: those of a picture of these sides, which is so many pixels to one of its latents.
    "height/8" is an eighth of "height"."""

    def size(side: int | str) -> int:
        if isinstance(side, int):
            return side
        name, _, fold = side.removeprefix("latent_").partition("/")
        return sides[name] // (downsample if side.startswith("latent_") else int(fold or 1))

    return [size(side) for side in shape]


def one_row(name: str, profile: Profile) -> str:
    """The program of ONE_ROW that computes a single row of a batch."""
    return name + ROW if profile.rows > 1 else name


def cache_names(config: Config) -> list[str]:
    """Names of the KV caches in program order: keys of every layer, then values."""
    return [f"{kind}.{layer}" for kind in ("key", "value") for layer in range(config.llm.num_hidden_layers)]


def cache_shape(config: Config, rows: int, slots: int) -> tuple[int, int, int, int]:
    return rows, slots, config.llm.num_key_value_heads, config.llm.head_dim


def signatures(config: Config, profile: Profile) -> dict[str, Signature]:
    """Every program's signature for a profile's shapes."""
    found = _signatures(config, profile)
    if profile.rows > 1:
        single = _signatures(config, dataclasses.replace(profile, rows=1))
        found |= {f"{name}{ROW}": single[name] for name in ONE_ROW}
    return found


def _signatures(config: Config, profile: Profile) -> dict[str, Signature]:
    c, p = config, profile
    total = p.rows * p.batches

    def ints(*names: str, rows: int = 1) -> Inputs:
        return dict.fromkeys(names, ((rows,), "int64"))

    def floats(*names: str, rows: int = p.rows) -> Inputs:
        return dict.fromkeys(names, ((rows,), "float32"))

    def latents(rows: int, *names: str) -> Inputs:
        return dict.fromkeys(names, ((rows, p.latents, c.latent_dim), "float32"))

    hidden = ((p.rows, p.latents, c.llm.hidden_size), "model")
    factors = ((MAX_ORDER + 1, *hidden[0]), "model")
    per_batch = [str(batch) for batch in range(p.batches)]
    step_inputs = {
        **ints("cond", "text", "img", rows=total),
        **floats("text_scale", "img_scale", "renorm_min", rows=total),
        **ints("renorm", rows=total),
        "dt": ((total, *c.time_shape(p.latents)), "float32"),
        **ints("n", rows=total),
        **latents(p.rows, *(f"x.{batch}" for batch in per_batch), *(f"v.{batch}" for batch in per_batch)),
    }
    position = {"position": ((1, *c.position_shape(p.patches)), "int64")}
    at = {"position": ((p.rows, *c.position_shape(p.latents)), "int64")}
    time = {"t": ((p.rows, *c.time_shape(p.latents)), "float32")}
    patches = {"patches": ((1, p.patches, c.vit.patch_dim), "float32"), "index": ((1, p.patches), "int64")}
    return {
        "text": Signature({"ids": ((1, p.text), "int64"), **ints("position", "kv_len")}, ("hidden",), 1),
        "vit": Signature({**patches, **ints("n")}, ("embeddings",)),
        "vit_context": Signature(
            {"embeddings": ((1, p.patches, c.llm.hidden_size), "model"), **position, **ints("n", "kv_len")},
            ("hidden",),
            1,
        ),
        "decode": Signature(ints("ids", "position", "kv_len", rows=p.rows), ("logits",), p.rows),
        "choose": Signature(
            {"logits": ((p.rows, c.llm.vocab_size), "float32"), **floats("temperature", "uniform")}, ("ids",)
        ),
        "generate": Signature(
            {
                **latents(p.rows, "x"),
                **time,
                "index": ((p.rows, p.latents), "int64"),
                **at,
                **ints("n", "kv_len", rows=p.rows),
            },
            ("velocity", "hidden"),
            p.rows,
        ),
        "step": Signature(step_inputs, tuple(f"{kind}.{batch}.out" for kind in ("x", "v") for batch in per_batch)),
        "taylor_update": Signature(
            {"hidden": hidden, **ints("differences", rows=p.rows), **floats("distance"), "factors": factors},
            ("new_factors",),
        ),
        "taylor_predict": Signature(
            {**floats("distance"), **latents(p.rows, "velocity"), "factors": factors}, ("new_velocity",)
        ),
        "tea_change": Signature(
            {
                **latents(p.rows, "x"),
                **time,
                "index": ((p.rows, p.latents), "int64"),
                **ints("n", rows=p.rows),
                "before": hidden,
            },
            ("change", "embedded"),
        ),
        "tea_apply": Signature(
            {
                **ints("what", rows=p.rows),
                **dict.fromkeys(("hidden", "embedded", "added"), hidden),
                **latents(p.rows, "velocity"),
            },
            ("new_added", "new_velocity"),
        ),
        **(_video(c) if c.longest > 1 else _picture(c)),
    }


def _picture(c: Config) -> dict[str, Signature]:
    """The VAE's programs."""
    latent = {"latent": ((1, c.vae.z_channels, "latent_height", "latent_width"), "float32")}
    return {
        "vae_encode": Signature({"pixels": ((1, 3, "height", "width"), "float32")}, ("moments",)),
        "vae_decode": Signature(latent, ("picture", "finite")),
    }


def _video(c: Config) -> dict[str, Signature]:
    """The same of a VAE with time, which takes a frame first and further ones with the state of those before."""

    def state(kept: list[tuple[int, int, int]]) -> Inputs:
        """Sides are those of frames by so many pixels, as "height/8"."""
        shapes = [(1, channels, frames, f"height/{fold}", f"width/{fold}") for channels, frames, fold in kept]
        return {f"state.{number}": (shape, "model") for number, shape in enumerate(shapes)}

    found = {}
    latent = (1, c.vae.z_channels, 1, f"height/{c.token_pixels}", f"width/{c.token_pixels}")
    for program, (name, first, later), kept, outputs in (
        (
            "vae_encode",
            ("pixels", (1, 3, 1, "height", "width"), (1, 3, c.vae.frames, "height", "width")),
            c.vae.encoder_state(),
            ("moments",),
        ),
        ("vae_decode", ("latent", latent, latent), c.vae.decoder_state(), ("picture", "finite")),
    ):
        carried = state(kept)
        outputs = (*outputs, *(f"{name}.out" for name in carried))
        found[program] = Signature({name: (first, "float32")}, outputs)
        found[program + NEXT] = Signature({name: (later, "float32"), **carried}, outputs)
    return found
