"""What of a model lies on a card and what on the host, planned from sizes alone before anything is allocated. No torch.

Every program needs the understanding expert, and flow steps alone need the other one. So the understanding expert stays
first, then what makes logits, then as many layers of the generation expert as there is room for; the rest streams.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from math import ceil, prod

from bagel_opt.config import PUBLISHED
from bagel_opt.dtypes import DTYPES
from bagel_opt.errors import ProfileError
from bagel_opt.files.parameters import parameter_shapes, quantized_shapes, stored_dtypes
from bagel_opt.lance.config import Config
from bagel_opt.profile import Profile
from bagel_opt.programs.signatures import LAYERED, ROW
from bagel_opt.quantization import kinds_of_products

ALIGNED = 256  # bytes; where a tensor of streamed weights begins
RESERVE = 10**9  # bytes of a GPU that CUDA, its libraries and captured graphs take, besides tensors
MARGIN = 1.25  # of intermediate values: what lies between tensors, and cuDNN's own
EXPERTS = ("und", "gen")
VISITORS = ("vit", "vae_encode", "vae_decode")  # programs whose weights can come for a call and go
GROUPS = {
    r"llm\.layers\.\d+\.und\.": "und",
    r"llm\.layers\.\d+\.gen\.": "gen",
    r"llm\.embed\.": "embed",
    r"llm\.lm_head\.": "head",
    r"(vit_encoder|connector|vit_position)\.": "vit",
    r"vae\.encoder\.": "vae_encode",
    r"vae\.decoder\.": "vae_decode",
    "": "rest",
}
# Seconds that an H100 computes for two rows of 4,096 latents at PUBLISHED's sizes, by the kind of the generation expert.
COMPUTING = {None: 0.186, "fp8": 0.120, "int8": 0.146, "int4": 0.197}
UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def needs(
    config: Config, profile: Profile, dtype: str, weights: int, kinds: Mapping[str, str] | None = None
) -> dict[str, int]:
    """weights: bytes of them. kinds: of the parts that are quantised. -> bytes of weights, of the KV caches of all batches,
    and of the largest program's intermediate values.

    The last is an estimate: what is alive at the widest place, which is the MLP of a flow step or of a prefill, or the
    VAE's first level at full resolution. Runtimes add some hundred megabytes of their own.
    """
    found = _workspaces(config, profile, DTYPES[dtype].bytes, kinds or {})
    return {"weights": weights, "caches": _caches(config, profile, dtype), "workspace": max(found.values())}


def _caches(config: Config, p: Profile, dtype: str) -> int:
    c = config.llm
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * DTYPES[dtype].bytes
    return p.batches * p.rows * p.slots * slot


def _workspaces(config: Config, p: Profile, size: int, kinds: Mapping[str, str]) -> dict[str, int]:
    """Intermediate values of the largest program that runs the layers, and of each of VISITORS."""
    c = config.llm
    tokens = max(p.rows * (p.latents + 2), p.patches + 2, p.text)
    layer = tokens * (3 * c.intermediate_size + 5 * c.hidden_size) * size
    products = kinds_of_products(kinds)
    if "int4" in products:  # the widest weight, unpacked for many tokens
        layer += 2 * c.intermediate_size * c.hidden_size * size
    elif products:  # what comes in, as codes
        layer += tokens * c.intermediate_size
    decode = p.rows * c.vocab_size * 4 * 3
    pixels = min(p.latents * config.token_pixels**2, config.largest_size**2)  # of a frame, if it is a video
    vit = p.patches * (2 * config.vit.intermediate_size + 5 * config.vit.hidden_size) * size
    held = config.vae.held(pixels) * size  # of another request's video, which is encoded or decoded in parts
    return {
        "layers": max(layer, decode) + held,
        "vit": vit + held,
        "vae_encode": config.vae.encoding(pixels) * size,
        "vae_decode": config.vae.decoding(pixels) * size,
    }


@dataclass(frozen=True)
class MemoryPlan:
    """memory: bytes of the card that may be used. reserve: of these, what is not for tensors. parts: bytes of weights, by
    GROUPS. streamed: by expert the layers whose weights come from the host each time. away: other parts on the host: those
    of VISITORS, which come for a call, and "embed" and "head", of which rows are read, or all of it, straight over the link.
    room: bytes for caches and intermediate values, weights that come for a call included."""

    config: Config
    dtype: str
    kinds: Mapping[str, str]
    memory: int
    reserve: int
    parts: Mapping[str, int]
    streamed: Mapping[str, tuple[int, ...]]
    away: frozenset[str]
    room: int

    def __str__(self) -> str:
        return (
            f"memory={size_text(self.memory)!r}: {size_text(self.resident)} for weights and buffers, {size_text(self.room)} for "
            f"caches and intermediate values; {size_text(self.host)} of weights on the host, of which "
            f"{size_text(self.step_bytes)} stream in a flow step and {size_text(self.token_bytes)} for a token of a text"
        )

    def on_host(self, name: str) -> bool:
        """Whether a parameter's weights lie there."""
        group = group_of(name)
        if group in EXPERTS:
            return int(name.split(".")[2]) in self.streamed[group]
        return group in self.away

    def layer(self, expert: str) -> int:
        """Bytes of one layer's weights of an expert."""
        return self.parts[expert] // self.config.llm.num_hidden_layers

    def streams(self, expert: str) -> int:
        """Bytes that a program which runs this expert takes over the link each time."""
        return len(self.streamed[expert]) * self.layer(expert)

    def streams_in(self, program: str) -> bool:
        """Whether layers stream in a program of programs/signatures.py."""
        experts = EXPERTS if program.removesuffix(ROW) == "generate" else EXPERTS[:1]
        return program.removesuffix(ROW) in LAYERED and any(self.streamed[expert] for expert in experts)

    @property
    def step_bytes(self) -> int:
        """That one evaluation of the flow takes over the link."""
        return sum(map(self.streams, EXPERTS))

    @property
    def token_bytes(self) -> int:
        """That one token of a text takes over the link."""
        return self.streams("und") + ("head" in self.away) * self.parts["head"]

    @property
    def host(self) -> int:
        """Bytes of the host's page-locked memory."""
        return self.step_bytes + sum(self.parts[part] for part in self.away)

    @property
    def resident(self) -> int:
        """Bytes of weights that stay on the card, and of buffers for those that do not."""
        buffers = sum(2 * self.layer(expert) for expert, layers in self.streamed.items() if layers)
        return sum(self.parts.values()) - self.host + buffers

    def step_seconds(self, link: float, rows: int, latents: int) -> float:
        """Of an evaluation of the flow on a card that computes like an H100, by a link of so many bytes a second: the longer
        of computing and of copying, which go on side by side."""
        work, whole = (c.llm.expert_work for c in (self.config, PUBLISHED))
        computing = COMPUTING[self.kinds.get("gen")] * work * rows * latents / (whole * 2 * 4096)
        return max(computing, self.step_bytes / link)

    def check(self, profile: Profile) -> None:
        """Raises ProfileError for a profile whose caches and intermediate values have no room."""
        need = needed_room(self.config, profile, self.dtype, self.kinds, self.parts, self.away)
        if need > self.room:
            least = self.memory + need - self.room
            raise ProfileError(
                f"this needs {size_text(need)} for caches and intermediate values, of which memory={size_text(self.memory)!r} leaves "
                f"{size_text(self.room)}; use a smaller height and width, a smaller input picture or a shorter text, or load with "
                f"memory={_up(least)!r}"
            )


def group_of(name: str) -> str:
    """Of GROUPS, for the name of a parameter of `Bagel`."""
    return next(group for pattern, group in GROUPS.items() if re.match(pattern, name))


def bytes_of_parts(config: Config, dtype: str, kinds: Mapping[str, str]) -> dict[str, int]:
    """Of the weights, by GROUPS, each tensor from a multiple of ALIGNED on."""
    shapes, found = quantized_shapes(parameter_shapes(config), kinds), Counter(dict.fromkeys(GROUPS.values(), 0))
    fixed = stored_dtypes(shapes, kinds)
    for name, shape in shapes.items():
        found[group_of(name)] += -(-prod(shape) * DTYPES[fixed.get(name, dtype)].bytes // ALIGNED) * ALIGNED
    return dict(found)


def needed_room(
    config: Config,
    profile: Profile,
    dtype: str,
    kinds: Mapping[str, str],
    parts: Mapping[str, int],
    away: frozenset[str],
) -> int:
    """Bytes for a profile's caches and for what the largest program needs besides."""
    found = _workspaces(config, profile, DTYPES[dtype].bytes, kinds)
    coming = {name: parts[name] * (name in away) for name in found if name in VISITORS}
    return _caches(config, profile, dtype) + int(max(MARGIN * n + coming.get(name, 0) for name, n in found.items()))


def make_plan(
    config: Config,
    memory: "int | str",
    profile: Profile,
    dtype: str,
    kinds: Mapping[str, str],
    reserve: int = RESERVE,
) -> MemoryPlan:
    """What lies where, so that requests of a profile fit into so much memory, as bytes or as parsed by `parse_memory`.
    Raises ValueError with the least memory that would do."""
    given, memory = memory, parse_memory(memory)
    parts, layers = bytes_of_parts(config, dtype, kinds), config.llm.num_hidden_layers

    def made(away: frozenset[str], **streamed: int) -> MemoryPlan:
        room = needed_room(config, profile, dtype, kinds, parts, away)
        spread = {expert: _spread(streamed.get(expert, 0), layers) for expert in EXPERTS}
        return MemoryPlan(config, dtype, kinds, memory, reserve, parts, spread, away, room)

    def least(plan: MemoryPlan) -> int:
        return plan.resident + plan.room + plan.reserve

    ends = frozenset({"embed", *VISITORS})
    counts = range(
        4, layers + 1, 2
    )  # two buffers take turns, so the number is even, and fewer than 4 would save nothing
    ways = [made(frozenset()), made(ends)]
    ways += [made(ends, gen=count) for count in counts]
    ways += [made(ends | {"head"}, gen=count) for count in counts]
    ways += [made(ends | {"head"}, gen=max(counts, default=0), und=count) for count in counts]
    for plan in ways:
        if (rest := memory - least(plan)) >= 0:
            return replace(plan, room=plan.room + rest)
    smallest = min(ways, key=least)
    raise ValueError(
        f"memory={given!r}: with the weights in this precision and profile {profile.name!r} it takes at least "
        f"{_up(least(smallest))!r}: {size_text(smallest.resident)} for weights and buffers, {size_text(smallest.room)} for caches and "
        f"intermediate values, {size_text(reserve)} for CUDA; use quantization, or a smaller profile"
    )


# Ranks of this machine that load the same, each of which leaves its own copy of weights to the host.
COPIES: ContextVar[int] = ContextVar("COPIES", default=1)


def host_memory() -> int:
    """Bytes of the machine's memory; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def parse_memory(memory: "int | str") -> int:
    """Bytes, from a number of them or a text such as "12GB", of 10**9 bytes each, or "11.5GiB", of 2**30. Raises ValueError."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ValueError(
            f"memory={memory!r:.60}; allowed are a size such as '12GB' or '11.5GiB', and a number of bytes"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _up(count: int) -> str:
    """As `parse_memory` takes it, and not less."""
    unit = "GB" if count > 10**9 else "MB"
    return f"{ceil(count / UNITS[unit] * 100) / 100:g}{unit}"


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """So many layers, evenly, so that the link is never long without work."""
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))
