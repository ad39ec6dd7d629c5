"""Loading a checkpoint or a bundle: which runtime runs it, on which device, in which dtype."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bagel_opt.api import Model
from bagel_opt.config import BagelConfig
from bagel_opt.devices import check_kinds, compiles, torch_device, torch_dtype
from bagel_opt.errors import BundleError
from bagel_opt.examples import read_examples
from bagel_opt.files.adapters import Loras, Named
from bagel_opt.files.finding import find_bundle, find_place
from bagel_opt.files.manifest import MANIFEST, TOKENIZER, Manifest, read_manifest
from bagel_opt.installed import compiler, missing
from bagel_opt.profile import Profile, load_profile
from bagel_opt.programs.interface import Runtime
from bagel_opt.quantization import Quantization, kinds_of_parts
from bagel_opt.runtime.bundle_check import check_bundle
from bagel_opt.runtime.memory_plan import COPIES, RESERVE, MemoryPlan, host_memory, make_plan, size_text
from bagel_opt.sampling.default_profile import default_profile
from bagel_opt.tokenizer import Tokenizer
from bagel_opt.versions import check_onnxruntime, check_version, older_pillow

if TYPE_CHECKING:
    import torch

BACKENDS = ("eager", "compile")
log = logging.getLogger("bagel_opt")


def load(
    source: str | Path | None = None,
    *,
    backend: str = "eager",
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    attention: str = "auto",
    profile: "Profile | str | Path | None" = None,
    weights: "str | Path | None" = None,
    lora: Loras = (),
    adapters: Named = MappingProxyType({}),
    quantization: Quantization | None = None,
    memory: "str | int | None" = None,
    gpus: int | None = None,
    parallel: "str | Mapping[str, int]" = "auto",
    check: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Loads a checkpoint folder, a file of weights in one, a bundle folder, or a Hugging Face repo id of
    either; None is the model that ships.

    backend: "eager" or "compile"; a bundle brings its own. device: default CUDA where there is one.
    dtype: default bfloat16 on CUDA, else float32. attention: "auto", "sdpa", "cudnn", "flex" or "flash".
    profile: a Profile, a TOML file or a name; None fits the shapes to each call.
    weights: a fine-tune's file, folder or repo id over a checkpoint; what it lacks comes from the checkpoint. lora: adapters
    as peft writes them, each a file or a folder, or (file, factor), merged into the weights. adapters: those that are kept
    apart, by name, as `Model.set_adapters` takes them. quantization: "fp8", "int8" or "int4" for the layers of both
    experts, or an object from parts ("und", "gen", "vit", "head", "embeddings") to these; weights are quantised as they are read,
    and a folder of `quantize` has them so already. memory: what a GPU, or each, may be filled with, such as "12GB"; weights that have
    no room there stream in from the host, so that requests of the profile, or edits of the model's largest picture, fit.
    gpus: how many compute each request together, from `device` on, in a process each, which `Model.close` ends; with device="cpu"
    so many processes. parallel: what they share out: of a flow evaluation "guidance" (a request's branches, or several
    pictures) or "sequence" (the latents of each), of decoding "tensor" (the weights), ranks of each, such as {"guidance": 2,
    "sequence": 2}, or "auto", by the work at hand. Under torchrun the ranks are its processes: all but the first end in here.
    Which files were taken is logged to "bagel_opt", where there was a choice. check: compare a bundle's files with their sha256, which takes a while where they are huge. progress(done,
    total) in tensors or files.

    Raises FileNotFoundError for what is missing, CheckpointError or BundleError for what cannot be read, ValueError
    for a bad argument, ImportError for a missing package and MemoryError where the device is full.
    """
    if gpus is not None:
        return _on_ranks(
            {name: value for name, value in locals().items() if name not in ("gpus", "parallel")}, gpus, parallel
        )
    if parallel != "auto":
        raise ValueError(f"parallel={parallel!r} is for several GPUs: give gpus, too")
    if old := older_pillow():
        log.warning("%s; %s", *old)
    source = shipped_model() if source is None else source
    if find_bundle(source):
        if memory is not None:
            raise BundleError(
                f"memory={memory!r}: a bundle keeps all its weights on the device; load the checkpoint that it was made from "
                "with memory, or export that with quantization"
            )
        given = {
            "dtype": dtype,
            "profile": profile,
            "weights": weights,
            "lora": lora or None,
            "adapters": adapters or None,
            "quantization": quantization,
        }
        given |= {"attention": None if attention == "auto" else attention}
        for name, value in given.items():
            if value is not None:
                raise BundleError(f"{name}={value!r}: of a bundle this was fixed when it was exported; leave it out")
        return load_bundle(find_place(source), backend, device, progress, check)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; allowed for a checkpoint are {', '.join(map(repr, BACKENDS))}")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise missing(f"{source} is a checkpoint, which", "torch", error, "torch") from None
    check_version("torch", torch.__version__)

    from bagel_opt.files.checkpoint import Checkpoint
    from bagel_opt.model import attention as backends
    from bagel_opt.model.ops import TorchOps
    from bagel_opt.runtime.facts import faster
    from bagel_opt.runtime.memory_full import room_for_weights
    from bagel_opt.runtime.torch import NO_ADAPTERS, TorchRuntime
    from bagel_opt.runtime.torch_setup import prepare

    if adapters and memory is not None:
        raise ValueError(NO_ADAPTERS)
    where = torch_device(device)
    kind = torch_dtype(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    chosen = backends.choose(attention, where, kind)
    if chosen == "flex" and (lacks := compiler(where.type)).why:
        raise ValueError(f"attention='flex' has to be compiled ({lacks.why}): {lacks.do}, or use attention='sdpa'")
    compiled = backend == "compile" and compiles(where)
    fixed = [load_profile(profile)] if profile is not None else []
    kinds = kinds_of_parts(quantization)
    checkpoint = Checkpoint(source, weights, lora)
    for note in checkpoint.notes:
        log.info(note)
    check_kinds(where, kinds or checkpoint.kinds, source if checkpoint.kinds else None)
    for note in faster(where, chosen, asked=device is not None):
        log.info(note)
    plan = None
    if memory is not None:
        shapes = fixed[0] if fixed else default_profile(checkpoint.config)
        plan = _planned(checkpoint.config, memory, shapes, where, kind, kinds or checkpoint.kinds)
    warming = compiled and chosen == "flash"
    with room_for_weights(
        host="load with quantization='int8' or dtype='bfloat16'",
        gpu="load with memory='12GB', or as much as is free on it, or with quantization",
    ):
        with _warming_up(checkpoint.config, where, kind, kinds or checkpoint.kinds) if warming else nullcontext():
            model = checkpoint.load(where, kind, progress, kinds, plan.on_host if plan else lambda name: False)
        model.ops = TorchOps(chosen)
        runtime = TorchRuntime(prepare(model, compiled, plan))
    runtime.set_adapters(adapters)
    coarse = compiled or chosen == "flex"
    examples = read_examples(checkpoint.folder)
    return Model(runtime, checkpoint.config, checkpoint.tokenizer, fixed, round_up=coarse, examples=examples)


def _on_ranks(given: dict[str, Any], gpus: int, parallel: "str | Mapping[str, int]") -> Model:
    """`load` with the arguments given, on several GPUs."""
    if type(gpus) is not int or gpus < 1:
        raise ValueError(f"gpus={gpus!r}; allowed are whole numbers from 1 on")
    if gpus == 1:
        return load(**given)
    if os.name != "posix":
        raise ValueError(f"gpus={gpus}: several GPUs need Linux, or macOS for processes on the CPU")
    source, device, bundle = given["source"], given["device"], None
    if source is not None and find_bundle(source):
        manifest = read_manifest(find_place(source))
        if manifest.kind == "onnx":
            raise BundleError(f"gpus={gpus}: an ONNX bundle runs on one GPU; load a checkpoint or a bundle of torch's")
        bundle, device = source, manifest.device if device is None else device
    try:
        import torch
    except (ImportError, OSError) as error:
        raise missing(f"gpus={gpus}", "torch", error, "torch") from None
    from bagel_opt.runtime.parallel import Shares
    from bagel_opt.runtime.starting import load_on_ranks

    where, there = torch_device(device, bundle), torch.cuda.device_count()
    if where.type == "cuda" and (where.index or 0) + gpus > there:
        raise ValueError(f"gpus={gpus} from {where} on, but this machine has {there}")
    if where.type == "cpu" and device is None:
        raise ValueError(f"gpus={gpus}, but this torch finds no CUDA device; device='cpu' takes as many processes")
    Shares.read(parallel, gpus)
    return load_on_ranks(load, {**given, "device": where}, gpus, parallel, where)


def load_bundle(
    folder: Path,
    backend: str = "eager",
    device: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: bool = True,
    name: str = MANIFEST,
) -> Model:
    """Loads a bundle for `bagel_opt.load`. Raises BundleError, ValueError for a wrong backend or device, ImportError."""
    manifest = read_manifest(folder, name)
    if backend not in ("eager", manifest.kind):  # "eager" is what nobody asked for
        raise ValueError(f"backend={backend!r}, but {folder} is a bundle for {manifest.kind!r}; leave backend out")
    if device is not None and str(device).partition(":")[0] != manifest.device:
        raise ValueError(
            f"device={str(device)!r}; allowed for {folder} is {manifest.device!r}, which it was exported for"
        )
    check_bundle(folder, manifest, progress, check)
    tokenizer, special = Tokenizer(folder / TOKENIZER, BundleError), manifest.config.special
    if tokenizer.special != special or tokenizer.largest_id >= manifest.config.llm.vocab_size:
        raise BundleError(f"{folder / TOKENIZER} is of another model; copy or export the bundle again")
    runtime = (_onnx_runtime if manifest.kind == "onnx" else _torch_runtime)(folder, manifest, device)
    return Model(runtime, manifest.config, tokenizer, manifest.profiles, examples=read_examples(folder))


def _onnx_runtime(folder: Path, manifest: Manifest, device: Any) -> Runtime:
    cpu = manifest.device == "cpu"
    try:
        import onnxruntime  # noqa: F401
    except (ImportError, OSError) as error:
        raise missing("an ONNX bundle", "onnxruntime", error, "onnx" if cpu else "onnx-gpu") from None
    check_onnxruntime(manifest.device)
    from bagel_opt.runtime.onnx import OnnxRuntime

    if cpu:
        return OnnxRuntime(folder, manifest)
    try:
        from bagel_opt.runtime.onnx_gpu import OnnxGpuRuntime, usable_memory
    except ImportError as error:
        raise missing("a bundle for CUDA", "ml_dtypes", error, "onnx-gpu") from None
    number = str(device or "cuda").partition(":")[2] or "0"
    if not number.isdecimal():
        raise ValueError(f"device={str(device)!r}; allowed are 'cuda' and 'cuda:' with a GPU's number")
    return OnnxGpuRuntime(folder, manifest, usable_memory(int(number)))


def _torch_runtime(folder: Path, manifest: Manifest, device: Any) -> Runtime:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise missing(f"a bundle of kind {manifest.kind!r}", "torch", error, "torch") from None
    check_version("torch", torch.__version__)
    from bagel_opt.model.attention import choose
    from bagel_opt.runtime.facts import faster
    from bagel_opt.runtime.memory_full import room_for_weights
    from bagel_opt.runtime.torch_bundle import PackagedRuntime, compiled_runtime, lacking

    where = torch_device(manifest.device if device is None else device, folder)
    check_kinds(where, manifest.quantization, folder)
    if manifest.attention == "flash":
        try:  # which warns of what is broken now, not in a run
            choose("flash", where, torch_dtype(manifest.dtype, torch.float32))
        except ValueError as error:
            raise BundleError(f"{folder}: {str(error).replace('use ', 'export it with ')}") from None
        for note in faster(where, "flash", asked=True):
            log.info(note)
    quantize = "export the bundle with quantization"
    room = room_for_weights(host=quantize, gpu=quantize)
    if manifest.kind == "compile":
        with room:
            return compiled_runtime(folder, manifest, where, compiles(where))
    if manifest.kind == "aoti":
        made, ours = (version.partition("+")[0] for version in (manifest.versions["torch"], torch.__version__))
        wrong = ""
        if made != ours:
            wrong = f"torch {made}, and this is {ours}"
        elif lacks := lacking(manifest.machine, where):
            wrong = f"processors with {', '.join(lacks)}, which this one has not"
        if wrong:
            raise BundleError(f"{folder} was compiled for {wrong}; export it here, or use format 'export'")
    with room:
        return PackagedRuntime(folder, manifest, where)


def _planned(
    config: BagelConfig,
    memory: "str | int",
    profile: Profile,
    device: "torch.device",
    dtype: "torch.dtype",
    kinds: Mapping[str, str],
) -> MemoryPlan:
    """What lies where. Raises ValueError, also where the device or the host has less."""
    cuda = device.type == "cuda"
    plan = make_plan(config, memory, profile, str(dtype).removeprefix("torch."), kinds, RESERVE if cuda else 0)
    if cuda:
        import torch

        have = torch.cuda.get_device_properties(device).total_memory
        if plan.memory > have:
            raise ValueError(f"memory={memory!r}, but {torch.cuda.get_device_name(device)} has {size_text(have)}")
    copies = COPIES.get()
    if (have := host_memory()) and copies * plan.host > have:
        each = f" for each of {copies} ranks" if copies > 1 else ""
        raise ValueError(
            f"memory={memory!r} leaves {size_text(plan.host)} of weights to the host{each}, which has {size_text(have)}; "
            "use quantization"
        )
    log.info("%s", plan)
    return plan


def _warming_up(
    config: BagelConfig, device: "torch.device", dtype: "torch.dtype", kinds: Mapping[str, str]
) -> AbstractContextManager:
    from bagel_opt.runtime.torch_setup import register_kernels
    from bagel_opt.runtime.warm_up import warming_up

    if kinds:
        register_kernels(device)
    return warming_up(config, device, dtype, kinds)


def shipped_model() -> Path:
    """The checkpoint used when none is named: small, of flat shapes on plain backgrounds, made by bagel_opt.demo.train."""
    return Path(__file__).parent / "demo" / "checkpoint"
