"""What adapters that stay apart cost at full size, for full_size.py."""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bagel_opt.bench.contenders import Ours
from bagel_opt.bench.measure import evaluation, seconds
from bagel_opt.config import BagelConfig
from bagel_opt.files.checkpoint import published_shapes
from bagel_opt.files.lora import CONFIG, FILE
from bagel_opt.files.parameters import parameter_shapes
from bagel_opt.files.torch_weights import write_weights

RANK = 64
ROWS, LATENTS = 2, 4096
COUNTS = (0, 1, 4)  # adapters that are kept
REPEATS = 31


def write_adapter(folder: Path, config: BagelConfig, seed: int) -> Path:
    """A random adapter of the generation expert's products, as flow-GRPO trains them."""
    generator = torch.Generator().manual_seed(seed)
    layout = []
    for name, (rows, *columns) in published_shapes(config, parameter_shapes(config)).items():
        if columns and name.startswith("language_model.model.layers.") and "_moe_gen" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            layout.append((f"{stem}.lora_A.weight", (RANK, *columns), torch.bfloat16))
            layout.append((f"{stem}.lora_B.weight", (rows, RANK), torch.bfloat16))
    folder.mkdir()
    write_weights(
        folder / FILE,
        layout,
        ((name, 0.02 * torch.randn(shape, generator=generator, dtype=torch.bfloat16)) for name, shape, _ in layout),
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    return folder


def adapters(ours: Ours, progress: Callable[[str], None]) -> dict[str, float]:
    """Milliseconds of one evaluation of the flow and of a token, without adapters and with some of which one counts, and
    seconds until another adapter is in their place."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        places = [write_adapter(Path(temporary) / str(n), ours.model.config, n) for n in range(max(COUNTS) + 1)]
        for count in COUNTS:
            progress(f"{count} adapters")
            ours.model.set_adapters({str(n): (places[n], float(n == 0)) for n in range(count)})
            once, caches = evaluation(ours.model.runtime, ROWS, LATENTS)
            for _ in range(3):
                once()
            times = [1000 * seconds(once) for _ in range(REPEATS)]
            found[f"{count} adapters: {ROWS} rows of {LATENTS} latents, ms"] = statistics.median(times)
            ours.model.runtime.give_back(caches)
            ours.tokens()
            found[f"{count} adapters: token, ms"] = statistics.median(ours.tokens())
        switched = []
        for place in places:  # the first has room to make
            switched.append(seconds(lambda place=place: ours.model.set_adapters({"another": place})))
        found["another adapter from its file, s"] = statistics.median(switched[1:])
        ours.model.set_adapters({})
    return found
