"""What computes in a loaded runtime: the facts that the server logs and counts, and that `bagel-opt doctor` tells of what
would be loaded."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bagel_opt.installed import compiler, titled

if TYPE_CHECKING:
    import torch


def active(
    runtime: str,
    backend: str,
    device: str,
    dtype: str,
    attention: str,
    kinds: Mapping[str, str],
    compiler: str = "none",
    fused_products: str = "none",
) -> dict[str, str]:
    """The same words of every runtime. runtime: the library and its version; kinds: of the parts that are quantised."""
    quantization = ",".join(f"{part}={kind}" for part, kind in kinds.items()) or "none"
    return {
        "runtime": runtime,
        "backend": backend,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "fused_products": fused_products,
        "compiler": compiler,
        "quantization": quantization,
    }


def torch_active(
    backend: str, device: "torch.device", dtype: "torch.dtype", attention: str, kinds: Mapping[str, str]
) -> dict[str, str]:
    """backend: "eager", "compile", or a bundle's kind; attention: as `choose` names it."""
    import torch

    from bagel_opt.model.attention import described
    from bagel_opt.runtime.fused_products import described as fused

    more = {}
    if backend == "compile":
        more["compiler"] = compiled_by(device.type)
        if device.type == "cuda" and attention == "flash":
            more["fused_products"] = fused(device, dtype, {kinds.get(part) for part in ("und", "gen")})
    named = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
    name = str(dtype).removeprefix("torch.")
    return active(f"torch {torch.__version__}", backend, named, name, described(attention), kinds, **more)


def compiled_by(device: str) -> str:
    """What torch.compile takes, with its version where that is a package's."""
    return titled("triton") if device == "cuda" else compiler(device).name
