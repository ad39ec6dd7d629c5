"""Preparing a model for execution: what is compiled, how its layers are run, and whether programs are replayed as graphs."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bagel_opt.installed import fault, told
from bagel_opt.model.attention import of_vit
from bagel_opt.model.linear import Linear
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.quantized import Quantized
from bagel_opt.model.transformer import Layer, LayerRunner, run_layer
from bagel_opt.model.vae import NormSilu
from bagel_opt.programs.callables import programs
from bagel_opt.quantization import kinds_of_products
from bagel_opt.runtime.memory_plan import MemoryPlan
from bagel_opt.runtime.streaming import place_layers, place_visitors

log = logging.getLogger("bagel_opt")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model ready to run. fixed_slots: programs look at all slots of a cache, since each number of them would be
    compiled, or captured. free_rows: "generate" takes any number of rows at no cost, free_sizes: programs any number of
    tokens, patches and latents. spare_slots: added to each cache. graphs: whether programs are to be captured on the GPU.
    widen: products take the adapters beside their weights in one, see Linear.widen. compiled: whether layers are. plan: of
    what lies on the device, where that is not all."""

    model: Mixture
    programs: dict[str, Callable]
    fixed_slots: bool
    free_rows: bool
    free_sizes: bool
    spare_slots: int = 0
    graphs: bool = False
    widen: bool = False
    compiled: bool = False
    plan: MemoryPlan | None = None


def prepare(model: Mixture, compiled: bool = False, plan: MemoryPlan | None = None) -> Prepared:
    """The model with its programs, eager or compiled, which changes it. What is compiled serves all sizes, but for FlexAttention.
    plan: moves weights to where that has them."""
    if kinds_of_products(model.kinds):
        register_kernels(model.device)
    flex = model.ops.backend == "flex"
    if compiled or flex:
        # A layer compiles once for each program, or with FlexAttention for each shape, which is more than torch takes for normal.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if not compiled:
        made = _placed(model, plan, run_layer)
        return Prepared(model, made, fixed_slots=flex, free_rows=not flex, free_sizes=not flex, plan=plan)
    cuda, flash = model.device.type == "cuda", model.ops.backend == "flash"
    whole = model.ops.backend == "sdpa"  # the others may leave the graph
    # Lengths that happen to be equal, or equal to a number of channels, are not to be taken for the same.
    torch.fx.experimental._config.use_duck_shape = False
    if cuda:
        _use_kernels(model)
    else:
        for layer in model.vit_encoder.layers:  # one is compiled and serves all
            layer.compile(dynamic=not flex, fullgraph=whole)
    for layer in model.llm.layers if not flash else ():
        layer.compile(dynamic=False, fullgraph=whole)
    run = _two_streams(model) if flash else run_layer if flex else run_any_size
    return Prepared(
        model,
        _placed(model, plan, run),
        fixed_slots=flex or cuda,
        free_rows=flash,
        free_sizes=not flex,
        # More than are used, so that the part in use never is the whole, for which torch would compile anew.
        spare_slots=0 if flex or cuda else 128,
        graphs=cuda,
        widen=flash and run.way.fused,
        compiled=True,
        plan=plan,
    )


def _placed(model: Mixture, plan: MemoryPlan | None, run: LayerRunner) -> dict[str, Callable]:
    """The programs, with weights where a plan has them."""
    if plan is None:
        return programs(model, run)
    made = programs(model, place_layers(model, plan, run))
    return made | place_visitors(model, plan, made)


def run_any_size(layer: Layer, und_BTC: Tensor, *given: Any) -> tuple:
    """A LayerRunner: the layer is compiled for any number of tokens and slots, and of rows where there are several."""
    und_BTC = und_BTC.contiguous()  # an image's markers are one row's, repeated
    gen, cos, sin, k, v, start_B, seen, _, share = (*given, None)[:9]
    for x in (und_BTC, gen, cos, sin, k, v, start_B, seen.kv_len_B, seen.mask, share):
        for axis in range(min(2, x.ndim)) if x is not None else ():
            torch._dynamo.maybe_mark_dynamic(x, axis)
    for axis in (2, 3):  # [B, 1, Q, S]
        torch._dynamo.maybe_mark_dynamic(seen.mask, axis)
    return layer(und_BTC, *given)


def _use_kernels(model: Mixture) -> None:
    """Those of a GPU for what torch.compile would have to compile for each shape. Its ViT is no faster compiled."""
    from bagel_opt.runtime import group_norm, one_token

    vit = model.config.vit
    channels = vit.hidden_size // vit.num_attention_heads
    model.ops = dataclasses.replace(model.ops, of_vit=of_vit(model.ops.backend, channels))

    if all(parameter.ndim < 5 for parameter in model.vae.parameters()):
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


def _two_streams(model: Mixture) -> LayerRunner:
    from bagel_opt.runtime.two_streams import TwoStreams  # which compiles as it is made

    codes = any(isinstance(m, Quantized) and m.kind == "fp8" for m in model.modules())
    return TwoStreams(model.device, model.dtype, codes)
