"""Products in 8 bits: weights in codes with a scale for each output channel, what comes in rounded alike for each token.

The rounding of a token depends on nothing but that token, so neither neighbours nor padding can reach it. M tokens, C channels
in, N channels out.
"""

import torch
from torch import Tensor, nn

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LEAST = 1e-12  # a scale: of a token of zeros


def to_codes(x_MC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scale_M in float32) of rows or of tokens: x is nearly codes * scale. What is not finite gives scales that are
    not, so that it shows. The same bits on every device: torch divides by a number otherwise on a GPU than on a CPU."""
    wide = x_MC.float()
    scale = (wide.abs().amax(-1, keepdim=True) * (1 / _largest(dtype))).clamp(min=LEAST)
    codes = wide / scale
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale.squeeze(-1)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 127.0


# A custom op, of which runtime/quantized_products.py registers the kernels for GPUs; here is what it means.
@torch.library.custom_op("bagel_opt::quantized_product", mutates_args=())
def quantized_product(
    x_MC: Tensor, x_scale_M: Tensor, codes_NC: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x_MC @ codes_NC.T) * scales + bias, from codes, added up in float32 and rounded once: [M, N] in dtype."""
    out_MN = (x_MC.float() @ codes_NC.float().T) * x_scale_M[:, None] * scale_N
    return (out_MN if bias_N is None else out_MN + bias_N.float()).to(dtype)


@quantized_product.register_fake
def _(
    x_MC: Tensor, x_scale_M: Tensor, codes_NC: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x_MC.new_empty((x_MC.shape[0], codes_NC.shape[0]), dtype=dtype)


class Quantized(nn.Module):
    """The weight of a product in 8 bits. kind: "fp8" or "int8"."""

    def __init__(self, kind: str, rows: int, channels: int, device: torch.device | str | None = None):
        super().__init__()
        codes = torch.empty(rows, channels, dtype=DTYPES[kind], device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(rows, dtype=torch.float32, device=device), requires_grad=False)

    def store(self, weight_NC: Tensor) -> None:
        codes, scale = to_codes(weight_NC.to(self.codes.device), self.codes.dtype)
        self.codes.data.copy_(codes)
        self.scale.data.copy_(scale)

    def forward(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        codes_MC, scale_M = to_codes(x.flatten(0, -2), self.codes.dtype)
        if torch.compiler.is_compiling() and x.is_cuda and codes_MC.shape[0] == 1:
            # A sum that a compiler fuses with what is around it; a kernel of its own reads the weights more slowly.
            out_MN = (codes_MC.float() * self.codes.float()).sum(-1)[None] * scale_M * self.scale
            return (out_MN if bias_N is None else out_MN + bias_N.float()).to(x.dtype).view(*x.shape[:-1], -1)
        out_MN = quantized_product(codes_MC, scale_M, self.codes, self.scale, bias_N, x.dtype)
        return out_MN.view(*x.shape[:-1], -1)
