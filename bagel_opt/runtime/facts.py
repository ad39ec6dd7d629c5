"""What this machine has, what a model would run by on it, and what would not be used, and why. Needs none of the libraries
that it tells of, and raises nothing."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_opt.dtypes import COMPUTE
from bagel_opt.errors import reason
from bagel_opt.installed import ABSENT, FLASH, compiler, fault, mend_flash, out_of_bounds, told, version
from bagel_opt.quantization import IN_ONNX, KINDS, NEEDS
from bagel_opt.runtime.active import compiled_by
from bagel_opt.versions import EXTRAS, LEAST, PILLOW, check_onnxruntime, check_version, older_pillow

if TYPE_CHECKING:
    import torch

LIBRARIES = (
    *("torch", "triton", "flash-attn-4", "flash-attn-3", "flash-attn", "quack-kernels", "nvidia-cutlass-dsl"),
    *("onnxruntime", "onnxruntime-gpu", "cuda-bindings", "pillow"),
)
TORCH, ONNX, ONNX_GPU = (f"pip install 'bagel-opt[{extra}]'" for extra in EXTRAS.values())
# An ONNX model that hands its input on, to see which provider can be loaded.
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n'
    b"\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)

Unused = dict[str, str]  # what, why, and do: the command or the step that changes it, or nothing


def _unused(what: str, why: str, do: str = "") -> Unused:
    return {"what": what, "why": why, "do": do}


def facts() -> dict[str, Any]:
    """versions: of each of LIBRARIES, or None. devices: what each is, and `uses`, what would compute on it. unused: what
    would not. All of it goes into JSON as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on drivers: told as a reason
        versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        no_torch = _why_no_torch()
        gpus = [] if no_torch else [*_torch_gpus()]
        if no_torch:
            unused = [_unused("checkpoints, and bundles of aoti, export and compile", *no_torch)]
        else:
            unused = [*_torch_unused(gpus)]
        gpus = gpus or _smi_gpus()
        no_onnx = fault("onnxruntime")
        no_provider = no_onnx or (_why_no_cuda_provider() if gpus else None)
        for gpu in gpus if not no_provider else ():
            gpu["uses"]["ONNX bundles"] = f"onnxruntime {_onnxruntime_version()}, CUDAExecutionProvider"
        unused += _onnx_unused(no_onnx, no_provider, bool(gpus))
        unused += _other_versions()
        return {"versions": versions, "devices": [_cpu(), *gpus], "unused": unused}


def faster(device: "torch.device", attention: str, asked: bool) -> list[str]:
    """What is missing here that would make a model faster, in a line each. asked: whether the device was chosen."""
    unused = None
    if device.type == "cpu" and not asked and "CUDA_VISIBLE_DEVICES" not in os.environ:
        unused = _unseen_gpu()
    elif attention == "flash" and device.type == "cuda":
        unused = _flash_unused(device)
        if unused and unused["do"] != FLASH:  # it is broken, of which flash_package has warned
            unused = None
    return [f"{unused['why']}; {unused['do']}"] if unused else []


# ---- devices


def _cpu() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"device": "cpu", "model": platform.processor() or platform.machine(), "cores": cores}
    uses: dict[str, str] = {}
    if not _why_no_torch():
        import torch

        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        found["model"] = can.get("cpu_name", found["model"])
        level = torch.backends.cpu.get_cpu_capability()
        wide = [name for name, there in can.items() if there is True and name.startswith(("amx", "avx512_", "avx10"))]
        found["features"] = " ".join([level, *sorted(wide)])
        uses |= _attention(torch.device("cpu")) | _compiling("cpu")
        uses["quantization"] = f"{', '.join(KINDS)}: by torch's own products"
    if not fault("onnxruntime"):
        uses["ONNX bundles"] = f"onnxruntime {_onnxruntime_version()}; quantised: {', '.join(sorted(IN_ONNX))}"
    return found | {"uses": uses}


def _torch_gpus() -> Iterator[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return
    same: dict[tuple, dict[str, str]] = {}  # GPUs of a kind are asked once: trying kernels compiles them
    for number in range(torch.cuda.device_count()):
        device, about = torch.device("cuda", number), torch.cuda.get_device_properties(number)
        kind = about.name, about.major, about.minor
        if kind not in same:
            same[kind] = _gpu_uses(device)
        yield {
            "device": str(device),
            "model": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_bytes": about.total_memory,
            "uses": same[kind],
        }


def _gpu_uses(device: "torch.device") -> dict[str, str]:
    import torch

    from bagel_opt.runtime.fused_products import described

    have = torch.cuda.get_device_capability(device)
    kinds = [kind for kind, need in NEEDS.items() if have >= need]
    how = "by torch's own products, slowly" if fault("triton") else "by kernels in Triton"
    return (
        _attention(device)
        | {"fused products": described(device, torch.bfloat16, {None, "fp8"})}
        | _compiling("cuda")
        | {"quantization": f"{', '.join(kinds)}: {how}" if kinds else "none"}
    )


def _attention(device: "torch.device") -> dict[str, str]:
    import torch

    from bagel_opt.model.attention import choose, described

    return {f"attention, {name}": described(choose("auto", device, getattr(torch, name))) for name in COMPUTE}


def _compiling(device: str) -> dict[str, str]:
    return {"torch.compile": "none" if compiler(device).why else compiled_by(device)}


def _smi_gpus() -> list[dict[str, Any]]:
    """GPUs as their driver tells of them, where torch does not."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    if not shutil.which(query[0]):
        return []
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines() if line.strip()]
        return [
            {"device": f"cuda:{n}", "model": name, "capability": have, "memory_bytes": int(size) * 2**20, "uses": {}}
            for n, (name, have, size) in enumerate(rows)
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


# ---- what is not used


def _why_no_torch() -> tuple[str, str] | None:
    """(why, what to do)"""
    if why := fault("torch"):
        return f"torch {told(why)}", TORCH
    import torch

    return _too_old("torch", torch.__version__, TORCH)


def _too_old(library: str, found: str, do: str) -> tuple[str, str] | None:
    try:
        check_version(library, found)
    except ImportError:
        return f"{library} {found} is older than {LEAST[library]}", do.replace("install", "install --upgrade")
    return None


def _unseen_gpu() -> Unused | None:
    """A GPU that is there and that torch does not find."""
    import torch

    if torch.cuda.is_available() or not (gpus := _smi_gpus()):
        return None
    what = gpus[0]["model"]
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return _unused(what, f"CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        do = f"pip uninstall torch; {TORCH} (on Windows first torch, by the command that pytorch.org gives)"
        return _unused(what, f"torch {torch.__version__} is built without CUDA and does not see the {what}", do)
    try:
        torch.cuda.init()
        why = "no reason was given"
    except Exception as error:
        why = reason(error)
    do = "install the driver that this says, or a torch for an older CUDA by the command that pytorch.org gives"
    return _unused(what, f"torch {torch.__version__} cannot use the {what} ({why})", do)


def _flash_unused(device: "torch.device") -> Unused | None:
    """The newest FlashAttention that would run on a GPU and does not."""
    import torch

    from bagel_opt.model.attention import FLASH as PACKAGES
    from bagel_opt.model.attention import described, flash_package, mend

    for module, (name, function) in PACKAGES.items():
        if module == flash_package():
            return None
        why = fault(module, function)
        if why != ABSENT:
            return _unused("FlashAttention", f"{name} {told(why)}, so attention is {described('flash')}", mend(name))
        if name == "flash-attn-4" and torch.cuda.get_device_capability(device) >= (9, 0):
            return _unused("FlashAttention", f"{name} is not installed, so attention is {described('flash')}", FLASH)
    return None


def _torch_unused(gpus: list[dict[str, Any]]) -> Iterator[Unused]:
    import torch

    from bagel_opt.runtime import fused_products

    if (lacks := compiler("cpu")).why:
        yield _unused("torch.compile on the CPU", lacks.why, lacks.do)
    if not gpus:
        yield _unseen_gpu() or _unused("FlashAttention, quack-kernels, Triton", "there is no NVIDIA GPU here")
    elif (lacks := compiler("cuda")).why:
        yield _unused("torch.compile and quantised products on the GPU", lacks.why, lacks.do)
    for gpu in {gpu["model"]: gpu for gpu in gpus}.values():
        device = torch.device(gpu["device"])
        have = torch.cuda.get_device_capability(device)
        if have < (8, 0):
            yield _unused("FlashAttention", f"it needs compute capability 8.0, and {gpu['model']} has less")
        elif unused := _flash_unused(device):
            yield unused
        if (why := fused_products.fault(device, torch.bfloat16)) == ABSENT:
            yield _unused("fused products", "quack-kernels is not installed", FLASH)
        elif why:
            do = "" if why == fused_products.OTHERS else mend_flash()
            yield _unused("fused products", f"quack-kernels: {why}", do)
        elif why := fused_products.fault_fp8(device):
            yield _unused("fused products with fp8", f"quack-kernels: {why}", mend_flash())
        for kind, need in NEEDS.items():
            if have < need:
                needed = ".".join(map(str, need))
                yield _unused(
                    f"quantization {kind}", f"it needs compute capability {needed}, and {gpu['model']} has less"
                )


def _onnx_unused(no_onnx: str | None, no_provider: str | None, gpu: bool) -> Iterator[Unused]:
    if no_onnx:
        do = f"{ONNX}, or for the GPU {ONNX_GPU}" if gpu else ONNX
        yield _unused("ONNX bundles", f"onnxruntime {told(no_onnx)}", do)
        return
    if version("onnxruntime") and version("onnxruntime-gpu"):
        why = "onnxruntime and onnxruntime-gpu are both installed, and lie over each other"
        yield _unused("one of them", why, f"pip uninstall onnxruntime onnxruntime-gpu; {ONNX_GPU if gpu else ONNX}")
    if old := _too_old("onnxruntime", _onnxruntime_version(), ONNX):
        yield _unused("ONNX bundles", *old)
    if no_provider:
        yield _unused(
            "ONNX bundles on the GPU", *re.split(r"[:;] (?:install them with )?(?=pip )", no_provider, maxsplit=1)
        )


def _other_versions() -> Iterator[Unused]:
    """Of libraries that are used all the same."""
    if old := older_pillow():
        yield _unused(f"pillow>={PILLOW}", *old)
    for name, (asked, have) in out_of_bounds().items():
        if name not in ("pillow", *LEAST):  # which are told of above
            yield _unused(f"{name}{asked}", f"{name} {have} is installed", f"pip install '{name}{asked}'")


def _onnxruntime_version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def _why_no_cuda_provider() -> str | None:
    """As loading a bundle for CUDA would tell it."""
    try:
        import onnxruntime

        from bagel_opt.runtime.onnx import load_session
        from bagel_opt.runtime.onnx_gpu import PROVIDER, usable_memory

        check_onnxruntime("cuda")
        usable_memory(0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "identity.onnx"
            path.write_bytes(IDENTITY)
            load_session(path, onnxruntime.SessionOptions(), [PROVIDER])
    except Exception as error:
        return reason(error)
    return None
