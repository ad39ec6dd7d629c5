"""Programs cut into parts: what comes before the layers, one layer, what comes after. A runtime that compiles ahead
compiles one layer and runs it with each layer's weights, which are inputs like any other.
"""

import dataclasses
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from bagel_opt.export.examples import free_axes
from bagel_opt.model.attention import Visible
from bagel_opt.model.mixture import Mixture
from bagel_opt.programs.signatures import ROW

LAYERS = {"vit": "vit_encoder.layers.{}."}  # of all other programs that have layers: the transformer's
TRANSFORMER = "llm.layers.{}."


@dataclass(frozen=True)
class Part:
    """A function of tensors and of an owner's parameters.

    role: "whole", "start", "layer" or "end". prefix: what goes before the owner's names in the bundle, with {} for the
    layer's number. A start returns the layers' state and then what all layers share; a layer takes both, its caches
    and the valid slots, and returns the new state; an end takes the state and the program's inputs. A start of a program
    with caches takes one more tensor, as long as there are slots to look at, the first ones, and its mask covers those;
    with FlashAttention layers take each row's number of visible keys instead. free: dimensions of inputs that are not static.
    """

    role: str
    owner: nn.Module
    prefix: str
    call: Callable[..., tuple]
    inputs: tuple[Tensor, ...]
    free: tuple[dict | None, ...] = ()


def cut(
    model: Mixture,
    name: str,
    call: Callable,
    inputs: tuple[Tensor, ...],
    caches: list[Tensor],
    free: tuple[dict | None, ...],
    sides: Set[int],
) -> Iterator[Part]:
    """The parts of a program, with example inputs. Attention is the model's: SDPA with the mask as a tensor, or flash.
    sides: the sizes of inputs that are free."""
    if name == "vit" and model.config.vit_in_layers:
        parts = _vit(model, inputs)
    elif caches:
        parts = _transformer(model, name, inputs, caches)
    else:
        parts = iter([Part("whole", getattr(call, "__self__", call), "", call, inputs, free if any(free) else ())])
    for part in parts:
        found = part.free or tuple(free_axes(x, sides) for x in part.inputs)
        yield dataclasses.replace(part, free=found if any(found) else ())


def _vit(model: Mixture, inputs: tuple[Tensor, ...]) -> Iterator[Part]:
    layer = model.vit_encoder.layers[0]

    def start(*inputs: Tensor) -> tuple[Tensor, ...]:
        x_BPC, seen = model.start_vit(*inputs)
        return x_BPC.contiguous(), twice(seen.mask).contiguous()

    def run(x_BPC: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (layer(x_BPC, Visible(None, False, mask[:, :1]), model.ops.vit),)

    def end(x_BPC: Tensor, _: Tensor, index_BP: Tensor, __: Tensor) -> tuple:
        return model.end_vit(x_BPC, index_BP)

    state = start(*inputs)
    yield Part("start", model, "", start, inputs)
    yield Part("layer", layer, LAYERS["vit"], run, state)
    yield Part("end", model, "", end, (state[0], *inputs))


def _transformer(model: Mixture, name: str, inputs: tuple[Tensor, ...], caches: list[Tensor]) -> Iterator[Part]:
    layer, slots, name = model.llm.layers[0], caches[0].shape[1], name.removesuffix(ROW)
    flash, causal = model.ops.backend == "flash", model.start(name, inputs, slots).seen.causal

    def start(*inputs: Tensor) -> tuple[Tensor, ...]:
        *inputs, looked_at_S = inputs
        s = model.start(name, inputs, looked_at_S.shape[0])
        sees = s.seen.kv_len_B if flash else twice(s.seen.mask)
        given = s.und_BTC, s.gen_BNC, s.cos, s.sin, sees
        # in plain memory order, as compiled code expects what it was compiled for
        return tuple(x.contiguous() for x in given if x is not None)

    begins = *inputs, torch.zeros(slots // 2, dtype=torch.uint8, device=inputs[0].device)
    example = start(*begins)
    state = len(example) - 3

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        und_BTC, gen_BNC = tensors[0], tensors[1] if state == 2 else None
        cos, sin, sees, k, v, kv_len = tensors[state:]
        seen = Visible(sees, causal, None) if flash else Visible(None, False, sees[:, :1])
        out = layer(und_BTC, gen_BNC, cos, sin, k, v, kv_len, seen, model.ops)
        return out[:state]

    def end(*tensors: Tensor) -> tuple[Tensor, ...]:
        # cloned where it would hand out an input
        return tuple(
            x.clone() if any(x is y for y in tensors) else x
            for x in model.end(name, tensors[0], tensors[1] if state == 2 else None)
        )

    yield Part("start", model, "", start, begins)
    yield Part("layer", layer, TRANSFORMER, run, (*example, caches[0], caches[len(caches) // 2], inputs[-1]))
    yield Part("end", model, "", end, (*example[:state], *inputs))


def twice(mask: Tensor) -> Tensor:
    """torch 2.13 cannot read an archive back in which a single vector has a free length."""
    return mask.expand(-1, 2, -1, -1)


class Functional(nn.Module):
    """A part whose parameters, those with the given names, are inputs after its own."""

    def __init__(self, part: Part, names: list[str]):
        super().__init__()
        self.part, self.names = [part], names  # the list hides the part's module

    def forward(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (part,) = self.part
        with _reparametrize_module(part.owner, dict(zip(self.names, weights, strict=True))):
            return part.call(*inputs)
