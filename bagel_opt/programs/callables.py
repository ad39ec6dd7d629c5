"""The programs as torch runs, compiles and traces them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bagel_opt.model.mixture import Mixture
from bagel_opt.model.transformer import LayerRunner, run_layer
from bagel_opt.programs.choose_token import ChooseToken
from bagel_opt.programs.guidance import GuidedStep
from bagel_opt.programs.signatures import ALONE, LAYERED, ONE_ROW, ROW
from bagel_opt.programs.step_cache import TaylorPredict, TaylorUpdate, TeaApply, TeaChange


@dataclass(frozen=True, eq=False)
class Layered:
    """A program that runs the transformer's layers, each by `run`: inputs, then caches -> outputs, then caches."""

    model: Mixture
    name: str
    run: LayerRunner

    def __call__(self, *tensors: Tensor) -> tuple:
        count = len(tensors) - 2 * len(self.model.llm.layers)
        return self.model.through_layers(self.name, tensors[:count], tensors[count:], self.run)


def programs(model: Mixture, run: LayerRunner = run_layer) -> dict[str, Callable]:
    """Callables from input tensors to a tuple of output tensors, by the names of programs/signatures.py."""
    found = {
        **{name: Layered(model, name, run) for name in LAYERED},
        **{name: getattr(model, name) for name in ALONE if hasattr(model, name)},
        "choose": ChooseToken(),
        "step": GuidedStep(),
        "taylor_update": TaylorUpdate(),
        "taylor_predict": TaylorPredict(model),
        "tea_change": TeaChange(model),
        "tea_apply": TeaApply(model),
    }
    return found | {f"{name}{ROW}": found[name] for name in ONE_ROW}
