"""The torch runtime: eager, or with the transformer's and the ViT's layers compiled."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bagel_opt.model.bagel import Bagel
from bagel_opt.model.cache import empty_cache
from bagel_opt.profile import Profile
from bagel_opt.runtime.programs import programs

_FLAGS = threading.Lock()


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Without TF32, to which torch lets convolutions round float32 on CUDA: the VAE would be 1e-3 off.

    The setting, like the choice of an SDPA backend, is the process's, so only one thread at a time may have it.
    """
    with _FLAGS, torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
        yield


class TorchRuntime:
    def __init__(self, model: Bagel, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.model, self.config, self.device, self.dtype = model, model.config, device, dtype
        self.programs = programs(model)
        if compiled or model.llm.backend == "flex":
            # Each shape of each program compiles once, which is more than torch takes for normal.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        if compiled:  # one layer is compiled and serves all of its kind
            for layer in (*model.llm.layers, *model.vit_encoder.layers):
                layer.compile(dynamic=False)

    def for_profile(self, profile: Profile) -> "TorchRuntime":
        """Its programs take any shape."""
        return self

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        c = self.config.llm
        sizes = c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim
        return empty_cache(*sizes, dtype=self.dtype, device=self.device)

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype if hidden else torch.float32, device=self.device)

    def write_row(self, tensor: Tensor, row: int, values: np.ndarray) -> Tensor:
        tensor[row, : len(values)] = torch.from_numpy(values).to(tensor)
        return tensor

    def clear_row(self, caches: list, row: int) -> None:
        for cache in caches:
            cache[row] = 0

    def copy_row(self, source: list[Tensor], row: int, target: list[Tensor], to: int, length: int) -> None:
        for a, b in zip(source, target, strict=True):
            b[to, :length] = a[row, :length]

    def run(self, program: str, inputs: list, caches: list[Tensor] = (), row: int | None = None) -> tuple:
        if row is not None:
            caches = [cache[row : row + 1] for cache in caches]
        tensors = [torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in inputs]
        with torch.no_grad(), _exact() if self.device.type == "cuda" else contextlib.nullcontext():
            out = self.programs[program](*tensors, *caches)
        return out[: len(out) - len(caches)]

    def host(self, tensor: Tensor, row: int | None = None) -> np.ndarray:
        tensor = tensor if row is None else tensor[row]
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
