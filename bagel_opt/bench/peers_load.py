"""What `bagel_opt.load` of a checkpoint takes, in a process of its own: python -m bagel_opt.bench.peers_load FOLDER"""

import json
import sys
import time
from pathlib import Path

import torch

import bagel_opt
from bagel_opt.files.checkpoint import Checkpoint


def figures(folder: Path) -> dict[str, float | int | None]:
    """Seconds of reading the headers and of all; the most bytes held on the host, mapped files included, and on the GPU; and
    how many tensors of the files are equal, bit by bit, to what was loaded."""
    begun = time.perf_counter()
    checkpoint = Checkpoint(folder)
    headers = time.perf_counter() - begun
    begun = time.perf_counter()
    model = bagel_opt.load(folder)
    found: dict[str, float | int | None] = {"headers, s": headers, "load, s": time.perf_counter() - begun}
    status = Path("/proc/self/status")
    for name, field in (("host peak, bytes", "VmHWM:"), ("anonymous on the host, bytes", "RssAnon:")):
        found[name] = 1024 * int(status.read_text().split(field)[1].split()[0]) if status.exists() else None
    on_gpu = torch.cuda.is_available()
    found["GPU peak, bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
    loaded, equal, count = dict(model.runtime.model.named_parameters()), 0, 0
    with torch.device("meta"):
        like = type(model.runtime.model)(checkpoint.config)
    for name, parts in checkpoint.read(like):
        rows = loaded[name].split([len(part) for part in parts])
        for part, own in zip(parts, rows, strict=True):
            equal += torch.equal(part.to(own.device, own.dtype), own)
            count += 1
    return found | {"tensors": count, "equal tensors": equal}


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1]))))
