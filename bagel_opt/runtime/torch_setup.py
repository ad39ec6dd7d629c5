"""Preparing a model for execution: what is compiled, how its layers are run, and whether programs are replayed as graphs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bagel_opt.installed import fault, told
from bagel_opt.model.bagel import Bagel
from bagel_opt.model.linear import Linear
from bagel_opt.model.quantized import Quantized
from bagel_opt.model.transformer import LayerRunner, run_layer
from bagel_opt.model.vae import NormSilu
from bagel_opt.programs.callables import programs

log = logging.getLogger("bagel_opt")


@dataclass(frozen=True)
class Prepared:
    """A model ready to run. fixed_slots: programs look at all slots of a cache, since each number of them would be
    compiled, or captured. free: they take any numbers of rows, tokens, patches and latents. spare_slots: added to each
    cache. graphs: whether programs are to be captured on the GPU. widen: products take the adapters beside their weights in
    one, see Linear.widen. compiled: whether layers are."""

    model: Bagel
    programs: dict[str, Callable]
    fixed_slots: bool
    free: bool
    spare_slots: int = 0
    graphs: bool = False
    widen: bool = False
    compiled: bool = False


def prepare(model: Bagel, compiled: bool = False) -> Prepared:
    """The model with its programs, eager or compiled, which changes it. What is compiled serves all sizes, but for FlexAttention."""
    if any(isinstance(module, Quantized) for module in model.modules()):
        register_kernels(model.device)
    flex = model.ops.backend == "flex"
    if compiled or flex:
        # A layer compiles once for each program, or with FlexAttention for each shape, which is more than torch takes for normal.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if not compiled:
        return Prepared(model, programs(model), fixed_slots=flex, free=not flex)
    cuda, run, spare, widen = model.device.type == "cuda", run_layer, 0, False
    layers = [] if cuda else [*model.vit_encoder.layers]  # one is compiled and serves all of its kind
    if model.ops.backend == "flash":
        run = _two_streams(model)
        widen = run.way.fused
    else:
        layers += model.llm.layers
        if not flex and not cuda:
            # More slots than are used, so that the part in use never is the whole, for which torch would compile anew.
            spare = 128
    if cuda:
        _use_kernels(model)
    # Lengths that happen to be equal, or equal to a number of channels, are not to be taken for the same.
    torch.fx.experimental._config.use_duck_shape = False
    for layer in layers:
        layer.compile(dynamic=not flex)
    return Prepared(
        model,
        programs(model, run),
        fixed_slots=flex or cuda,
        free=not flex,
        spare_slots=spare,
        graphs=cuda,
        widen=widen,
        compiled=True,
    )


def _use_kernels(model: Bagel) -> None:
    """Those of a GPU for what torch.compile would have to compile for each shape. Its ViT is no faster compiled."""
    from bagel_opt.runtime import group_norm, one_token

    model.vae.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, NormSilu):
            module.compute = group_norm.norm_silu
    for module in model.llm.modules():
        if isinstance(module, Linear):
            module.multiply = one_token.linear


def register_kernels(device: torch.device) -> None:
    """Those that quantised products take on a GPU. Without Triton, torch computes what they mean (model/quantized.py)."""
    if device.type != "cuda":
        return
    if why := fault("triton"):
        log.warning(
            "Triton %s, so quantised products run by torch's own kernels, much more slowly; pip install triton",
            told(why),
        )
        return
    import bagel_opt.runtime.int4_products
    import bagel_opt.runtime.quantized_products  # noqa: F401


def _two_streams(model: Bagel) -> LayerRunner:
    from bagel_opt.runtime.two_streams import TwoStreams  # which compiles as it is made

    codes = any(isinstance(m, Quantized) and m.kind == "fp8" for m in model.modules())
    return TwoStreams(model.device, model.dtype, codes)
