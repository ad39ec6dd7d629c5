"""Running every program once, on random inputs: to warm a cache, or to compare two runtimes."""

from collections.abc import Callable

import numpy as np

from bagel_opt.lance.config import Config
from bagel_opt.profile import Profile
from bagel_opt.programs.interface import Runtime
from bagel_opt.programs.signatures import MAX_ORDER, NEXT, OUTPUTS, ROW, one_row, signatures, sized


def run_programs(runtime: Runtime, config: Config, profile: Profile) -> list[tuple[str, list[np.ndarray]]]:
    """(program, its outputs and the caches after it) for the same random inputs, in an order that fills a context."""
    c, p, rng = config, profile, np.random.default_rng(0)
    caches = runtime.caches(p.rows, p.slots)
    total, found = p.rows * p.batches, []

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def whole(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    def at(rows: int, tokens: int, position: int) -> np.ndarray:
        return np.full((rows, *c.position_shape(tokens)), position, np.int64)

    def times(t_R: np.ndarray) -> np.ndarray:
        """Of rows, or of each of their tokens."""
        shape = c.time_shape(p.latents)
        return np.broadcast_to(t_R.reshape(-1, *[1] * len(shape)), (len(t_R), *shape)).astype(np.float32)

    def run(
        name: str, *inputs: np.ndarray, row: int | None = None, cached: bool = False, real: int | None = None
    ) -> None:
        """real: how many tokens of the outputs are no padding, of which nothing is promised."""
        outputs = [runtime.host(x) for x in runtime.run(name, list(inputs), caches if cached else (), row)]
        if real is not None:
            outputs = [x[:, :real] for x in outputs]
        found.append((name, outputs + ([_filled(runtime, cache) for cache in caches] if cached else [])))

    def _filled(runtime: Runtime, cache: object) -> np.ndarray:
        return runtime.host(cache)[:1, :length]

    def room(wanted: int, padded: int) -> int:
        """Slots of context, of which there may be few in a small profile."""
        return max(0, min(wanted, p.slots - padded))

    real = max(1, p.text - 1)
    length = real
    run("text", rng.integers(0, c.llm.vocab_size, (1, p.text)), whole(0), whole(0), row=0, cached=True, real=real)
    join = c.vit_joins or 1
    patches, index = normal(1, p.patches, c.vit.patch_dim), np.arange(p.patches)[None] % c.vit.places
    n = max(join, (p.patches - 1) // join * join)
    run("vit", patches, index, whole(n), real=n // join)
    embeddings = normal(1, p.patches, c.llm.hidden_size)
    n = max(1, p.patches - 1)
    before = room(length, p.patches + 2)
    length = before + n + 2
    run("vit_context", embeddings, at(1, p.patches, real), whole(n), whole(before), row=0, cached=True, real=2 + n)
    n = max(1, p.latents - 1)
    places = np.arange(p.latents)[None] % c.places
    before = room(length, p.latents + 2)
    length = before + n + 2
    clean = (
        normal(1, p.latents, c.latent_dim),
        times(np.zeros(1)),
        places,
        at(1, p.latents, real + 1),
        whole(n),
        whole(before),
    )
    run(one_row("generate", p), *clean, row=0, cached=True, real=n)
    before = room(length, 1)
    length = before + 1
    rows = np.ones(p.rows, np.int64)
    step = rng.integers(0, c.llm.vocab_size, p.rows), (real + 2) * rows, before * rows
    run("decode", *step, cached=True)
    if p.rows > 1:
        run("decode" + ROW, *(x[:1] for x in step), row=0, cached=True)
    before = room(length, p.latents + 2)
    length = before + n + 2
    noisy = normal(p.rows, p.latents, c.latent_dim)
    t = times(np.linspace(0.1, 1, p.rows))
    tables = np.repeat(places, p.rows, axis=0)
    step = noisy, t, tables, at(p.rows, p.latents, real + 3), n * rows, before * rows
    run("generate", *step, cached=True, real=n)
    if p.rows > 1:
        run("generate" + ROW, *(x[:1] for x in step), row=0, cached=True, real=n)

    warm = np.arange(p.rows) % 2 * np.float32(0.7)
    step = normal(p.rows, c.llm.vocab_size), warm.astype(np.float32), rng.random(p.rows, np.float32)
    run("choose", *step)
    if p.rows > 1:
        run("choose" + ROW, *(x[:1] for x in step))
    order = np.arange(total)
    scales = [np.full(total, value, np.float32) for value in (4.0, 1.5, 0.0)]
    counts = np.full(total, p.latents, np.int64)
    batches = [normal(p.rows, p.latents, c.latent_dim) for _ in range(2 * p.batches)]
    dt = times(np.full(total, 0.05))
    run("step", order, np.roll(order, 1), np.roll(order, 2), *scales, order % 3, dt, counts, *batches)
    factors = normal(MAX_ORDER + 1, p.rows, p.latents, c.llm.hidden_size)
    hidden, three = normal(p.rows, p.latents, c.llm.hidden_size), np.full(p.rows, 3, np.float32)
    run("taylor_update", hidden, np.arange(p.rows) % (MAX_ORDER + 1), three, factors)
    run("taylor_predict", three - 2, noisy, factors)
    run("tea_change", noisy, t, tables, counts[: p.rows], hidden)
    run("tea_apply", np.arange(p.rows) % 3, hidden, *factors[:2], noisy)
    _run_vae(runtime, c, p, normal, found)
    runtime.give_back(caches)
    return found


def _run_vae(runtime: Runtime, c: Config, p: Profile, normal: Callable, found: list) -> None:
    """A part of a picture or a video, and where there can be one a further part after it."""
    wanted, side = signatures(c, p), 4 * c.token_pixels
    for name, outputs in OUTPUTS.items():
        state: list = []
        for program in (name, name + NEXT):
            if program in wanted:
                (given, (shape, _)), *_ = wanted[program].inputs.items()
                x = normal(*sized(shape, {"height": side, "width": side}, c.vae.downsample))
                made = runtime.run(program, [np.clip(x, -1, 1) if given == "pixels" else x, *state])
                state = list(made[outputs:])
                found.append((program, [runtime.host(tensor) for tensor in made]))
