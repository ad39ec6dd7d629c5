"""Loading a model on several ranks: the other ones' processes are started, or torchrun has, and each loads it, too."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bagel_opt.runtime.member import JOINED, LOADED, Place, join, serve
from bagel_opt.runtime.members import Members, failure, found_by_torchrun, start
from bagel_opt.runtime.memory_plan import COPIES
from bagel_opt.runtime.mirrored import MirroredRuntime
from bagel_opt.runtime.parallel import Parallel

LOADING = 3600  # seconds that another rank may load for longer than the first


def load_on_ranks(load: Callable, given: Mapping[str, Any], gpus: int, parallel: Parallel, device: torch.device) -> Any:
    """What load(**given) loads, on so many ranks. device: the first one's; the others have the GPUs after it. Other ranks that
    torchrun started perform calls until the first closes, and exit. Raises what `load` does on any of them."""
    cuda, torchrun = device.type == "cuda", "WORLD_SIZE" in os.environ and "RANK" in os.environ

    def place(rank: int, folder: str) -> Place:
        where = ("cuda:" + os.environ["LOCAL_RANK"] if torchrun else "cuda") if cuda else "cpu"
        own = {name: value for name, value in given.items() if name != "progress"}
        own["adapters"] = dict(own["adapters"]) if isinstance(own["adapters"], Mapping) else own["adapters"]
        name = f"{load.__module__}:{load.__qualname__}"
        return Place(rank, gpus, folder, name, {**own, "device": where, "check": False}, parallel)

    def environment(rank: int) -> dict[str, str]:
        if not cuda:
            return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // gpus))}
        number, visible = (device.index or 0) + rank, os.environ.get("CUDA_VISIBLE_DEVICES")
        # a process sees its own GPU alone, so nothing it does lands on another
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number] if visible else str(number)}

    if not torchrun:
        members = start(place, gpus, environment)
    elif int(os.environ["WORLD_SIZE"]) != gpus:
        raise ValueError(
            f"gpus={gpus}, but torchrun started {os.environ['WORLD_SIZE']} processes; give it the same number"
        )
    elif not isinstance(members := found_by_torchrun(place, gpus), Members):
        connection, mine = members
        if cuda:
            torch.cuda.set_device(torch.device(mine.given["device"]))
        serve(connection, mine)
        sys.exit(0)
    copies = COPIES.set(int(os.environ.get("LOCAL_WORLD_SIZE", gpus)) if torchrun else gpus)
    try:
        model = load(**given)
        for number, message in ((LOADED, "join"), (JOINED, None)):
            if message is None:
                rank = members.beside(lambda: join(place(0, members.folder.name), model.runtime))
            for other, answer in enumerate(members.wait_for(number, LOADING), 1):
                if answer.error:
                    raise failure(other, answer)
            if message:
                members.send(message)
        model.runtime = MirroredRuntime(rank, members, parallel)
        return model
    except BaseException:
        members.fail("loading failed")
        members.close()
        raise
    finally:
        COPIES.reset(copies)
