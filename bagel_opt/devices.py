"""The device and the dtype that somebody asks for, and what there is for them."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bagel_opt.dtypes import COMPUTE
from bagel_opt.errors import BundleError
from bagel_opt.installed import compiler
from bagel_opt.quantization import NEEDS, kinds_of_products

if TYPE_CHECKING:
    import torch

log = logging.getLogger("bagel_opt")


def torch_device(device: "str | torch.device | None", bundle: object = None) -> "torch.device":
    """Raises ValueError. bundle: its folder, where that leaves no choice."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}; allowed are 'cpu', 'cuda' and 'cuda:N'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        if bundle is not None:
            raise BundleError(f"{bundle} is for CUDA, of which this torch finds no device; export it with device='cpu'")
        raise ValueError(f"device={str(device)!r}, but this torch finds no CUDA device; use device='cpu'")
    return chosen


def torch_dtype(dtype: "str | torch.dtype | None", default: "torch.dtype") -> "torch.dtype":
    import torch

    if dtype is None:
        return default
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else str(dtype)
    if name not in COMPUTE:
        raise ValueError(f"dtype={str(dtype)!r}; allowed are {', '.join(map(repr, COMPUTE))}")
    return getattr(torch, name)


def check_kinds(device: "torch.device", kinds: Mapping[str, str], source: object = None) -> None:
    """Raises ValueError where a GPU has no products of these kinds (quantization.KINDS). source: what is quantised so already."""
    needed = kinds_of_products(kinds)
    if not needed or device.type != "cuda":
        return
    import torch

    have = torch.cuda.get_device_capability(device)
    for kind in sorted(needed):
        if have < NEEDS[kind]:
            can = [repr(other) for other, need in NEEDS.items() if have >= need]
            given, do = (
                ("quantization=", "use") if source is None else (f"{source} is quantised: ", "quantise it anew with")
            )
            raise ValueError(
                f"{given}{kind!r} needs a GPU of compute capability {'.'.join(map(str, NEEDS[kind]))}, and "
                f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, have))}; {do} {' or '.join(can) or 'none'}"
            )


def compiles(device: "torch.device") -> bool:
    """Whether torch.compile has a compiler for a device. Warns where it has none."""
    found = compiler(device.type)
    if found.why:
        log.warning("nothing is compiled (%s), so all runs eager, more slowly; %s", found.why, found.do)
    return not found.why
