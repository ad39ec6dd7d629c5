"""One contender in its own process: python -m bagel_opt.bench.worker JOB prints its figures as JSON."""

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import bagel_opt


def stamps(run: Callable[[Callable], object]) -> list[float]:
    """Milliseconds between the moments at which run(tick) calls tick, beginning with its own start."""
    seen = [time.perf_counter()]
    run(lambda _: seen.append(time.perf_counter()))
    return [1000 * (b - a) for a, b in itertools.pairwise(seen)]


def figures(model: bagel_opt.Model, work: dict) -> dict[str, list[float]]:
    picture = Image.effect_mandelbrot((work["width"], work["height"]), (-2, -1.2, 1, 1.2), 30).convert("RGB")
    shape = {"height": work["height"], "width": work["width"], "cfg_interval": (0.0, 1.0), "seed": 0}
    # Nearly uniform tokens, so that a trained model does not end its answer early.
    answer = {"do_sample": True, "text_temperature": 1000.0, "max_think_tokens": work["tokens"] + 2, "seed": 0}
    steps = {"num_timesteps": work["steps"] + 2}
    found: dict[str, list[float]] = {name: [] for name in ("prefill", "token", "step", "edit_step", "request")}
    for repeat in range(work["repeats"] + 1):
        begun = time.perf_counter()
        drawn = stamps(lambda tick: model.generate(work["prompt"], on_step=tick, **shape, **steps))
        request = time.perf_counter() - begun
        edited = stamps(
            lambda tick: model.edit(picture, work["prompt"], on_step=tick, cfg_interval=(0.0, 1.0), seed=0, **steps)
        )
        told = stamps(lambda tick: model.understand(picture, work["prompt"], on_token=tick, **answer))
        if repeat:
            found["step"] += drawn[1:]  # the first counts the prefill
            found["edit_step"] += edited[1:]
            found["prefill"].append(told[0])
            found["token"] += told[1:]
            found["request"].append(request)
    return found


def main() -> None:
    job = json.loads(sys.argv[1])
    begun = time.perf_counter()
    given = {name: job[name] for name in ("device", "dtype", "profile", "gpus") if job[name] is not None}
    if job["backend"] != "bundle":
        given |= {"backend": job["backend"], "attention": job["attention"]}
    model = bagel_opt.load(job["source"], **given)
    load = time.perf_counter() - begun
    if job["backend"] == "compile" != model.runtime.active()["backend"]:
        raise RuntimeError("nothing compiles here, so that eager would be timed; bagel-opt doctor says why")
    found = figures(model, job["work"])
    print(json.dumps({"load": [load], **found, "peak": peak()}))


def peak() -> int:
    """Most bytes that this process held: on the GPU where it used one, else in memory."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():  # getrusage counts what the parent held when it started this
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
