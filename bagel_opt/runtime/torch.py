"""The torch runtime: eager, or with the transformer's and the ViT's layers compiled."""

import numpy as np
import torch
from torch import Tensor

from bagel_opt.model.bagel import Bagel
from bagel_opt.model.cache import empty_cache
from bagel_opt.runtime.programs import programs


class TorchRuntime:
    def __init__(self, model: Bagel, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.model, self.device, self.dtype = model, device, dtype
        self.programs = programs(model)
        if compiled or model.llm.backend == "flex":
            # Each shape of each program compiles once, which is more than torch takes for normal.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        if compiled:  # one layer is compiled and serves all of its kind
            for layer in (*model.llm.layers, *model.vit_encoder.layers):
                layer.compile(dynamic=False)

    def caches(self, rows: int, slots: int) -> list[Tensor]:
        c = self.model.config.llm
        sizes = c.num_hidden_layers, rows, slots, c.num_key_value_heads, c.head_dim
        return empty_cache(*sizes, dtype=self.dtype, device=self.device)

    def zeros(self, shape: tuple[int, ...], hidden: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype if hidden else torch.float32, device=self.device)

    def write_row(self, tensor: Tensor, row: int, values: np.ndarray) -> Tensor:
        tensor[row, : len(values)] = torch.from_numpy(values).to(tensor)
        return tensor

    def copy_row(self, source: list[Tensor], row: int, target: list[Tensor], to: int, length: int) -> None:
        for a, b in zip(source, target, strict=True):
            b[to, :length] = a[row, :length]

    def run(self, program: str, inputs: list, caches: list[Tensor] = (), row: int | None = None) -> tuple:
        if row is not None:
            caches = [cache[row : row + 1] for cache in caches]
        tensors = [torch.from_numpy(x).to(self.device) if isinstance(x, np.ndarray) else x for x in inputs]
        # torch lets convolutions round float32 to TF32 on CUDA; the VAE's would then be 1e-3 off
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
            out = self.programs[program](*tensors, *caches)
        return out[: len(out) - len(caches)]

    def host(self, tensor: Tensor, row: int | None = None) -> np.ndarray:
        tensor = tensor if row is None else tensor[row]
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
