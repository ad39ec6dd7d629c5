"""Products with weights in 8 or 4 bits, and tables.

In 8 bits: codes with a scale for each output channel, and what comes in rounded alike for each token, unless it is a row's
only one: a token that is being decoded, where reading the weights takes all the time. In 4: codes with a scale for each
group of input channels, and what comes in as it is. The rounding of a token depends on nothing but that token, so neither
neighbours nor padding can reach it.

M tokens, C channels in, N channels out, G groups, B bytes of a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.quantization import KINDS

DTYPES = {kind: getattr(torch, stored.codes) for kind, stored in KINDS.items()}
# An AOTInductor package of torch 2.11 gives an operator another dtype than was asked for (findings/torch-aoti-dtype-of-an-operator.sh).
FLOATS = {getattr(torch, name): name for name in ("float64", "float32", "float16", "bfloat16")}
LEAST = 1e-12  # a scale: of a token of zeros
GROUP = KINDS["int4"].group
SHRUNK = tuple(1 - k / 24 for k in range(-1, 6))  # of a group's full range: the one that errs least is taken
# Numbers of a weight that are quantised at a time, to 8 bits and to 4: what is made of them on the way is several times as large,
# and for 4 bits stays in a core's cache. On a GPU each piece costs a hundred launches.
AT_ONCE, AT_ONCE_IN_GROUPS, AT_ONCE_ON_GPU = 2**20, 2**17, 2**24


def to_codes(x_MC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scale_M in float32) of rows or of tokens: x is nearly codes * scale. What is not finite gives scales that are
    not, so that it shows. The same bits on every device: torch divides by a number otherwise on a GPU than on a CPU."""
    wide = x_MC.float()
    scale = (wide.abs().amax(-1, keepdim=True) * (1 / _largest(dtype))).clamp(min=LEAST)
    codes = wide / scale
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale.squeeze(-1)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else 127.0


def to_groups(weight_NC: Tensor) -> tuple[Tensor, Tensor]:
    """(codes_NB in uint8, scale_NG in bfloat16): 16 levels, of which the largest number of a group has the outermost. A
    byte has the codes of two channels, plus 8, the first in its low bits."""
    return _in_turn(_to_groups, weight_NC, AT_ONCE_IN_GROUPS)


def _to_groups(weight_NC: Tensor) -> tuple[Tensor, Tensor]:
    """A group is a column here: what is done with one scale after the other then runs along memory."""
    rows, channels = weight_NC.shape
    x = F.pad(weight_NC.float(), (0, -channels % GROUP)).view(-1, GROUP).t().contiguous()
    lowest, highest = x.aminmax(dim=0)
    outermost = lowest.where(-lowest > highest, highest)
    part, codes = x / outermost, torch.empty_like(x)  # the errors' squares have to be in range
    found = None
    for shrunk in SHRUNK:
        scale = (outermost * (-shrunk / 8)).bfloat16().float()
        error = _rounded(x, scale, codes).mul_(scale / outermost).sub_(part).square_().sum(0)
        if found is None:
            found = error, scale
        else:
            found = tuple(torch.where(error < found[0], *pair) for pair in zip((error, scale), found, strict=True))
    low, high = (_rounded(x, found[1], codes).nan_to_num_() + 8).to(torch.uint8).unflatten(0, (-1, 2)).unbind(1)
    return (low + 16 * high).t().reshape(rows, -1), found[1].bfloat16().view(rows, -1)


def _rounded(x: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """The codes of x, written over others."""
    return torch.div(x, scale.where(scale != 0, 1), out=codes).round_().clamp_(-8, 7)


def from_groups(codes_NB: Tensor, scale_NG: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """What the codes of rows stand for: [..., channels]."""
    codes = torch.stack((codes_NB & 15, codes_NB >> 4), dim=-1).float().view(*scale_NG.shape, GROUP) - 8
    return (codes * scale_NG.float()[..., None]).to(dtype).flatten(-2)[..., :channels]


def to_kind(weight_NC: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a weight, as that kind stores it."""
    if KINDS[kind].group:
        return to_groups(weight_NC)
    return _in_turn(lambda rows: to_codes(rows, DTYPES[kind]), weight_NC, AT_ONCE)


def _in_turn(make: Callable[[Tensor], tuple[Tensor, Tensor]], weight_NC: Tensor, numbers: int) -> tuple[Tensor, Tensor]:
    """(codes, scale) of some rows, of so many numbers, after others."""
    numbers = numbers if weight_NC.device.type == "cpu" else AT_ONCE_ON_GPU
    codes, scales = zip(*map(make, weight_NC.split(max(1, numbers // weight_NC.shape[1]))), strict=True)
    return torch.cat(codes), torch.cat(scales)


# Custom ops, of which runtime/quantized_products.py registers the kernels for GPUs; here is what they mean.
@torch.library.custom_op("bagel_opt::quantized_product", mutates_args=())
def quantized_product(
    x_MC: Tensor,
    x_scale_M: Tensor | None,
    codes_NC: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: str,
) -> Tensor:
    """(x_MC @ codes_NC.T) * scales + bias, added up in float32 and rounded once: [M, N] in dtype, a name of FLOATS. x: codes where they
    have a scale."""
    out_MN = (x_MC.float() @ codes_NC.float().T) * scale_N
    out_MN = out_MN if x_scale_M is None else out_MN * x_scale_M[:, None]
    return (out_MN if bias_N is None else out_MN + bias_N.float()).to(getattr(torch, dtype))


@quantized_product.register_fake
def _(
    x_MC: Tensor,
    x_scale_M: Tensor | None,
    codes_NC: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    dtype: str,
) -> Tensor:
    return x_MC.new_empty((x_MC.shape[0], codes_NC.shape[0]), dtype=getattr(torch, dtype))


@torch.library.custom_op("bagel_opt::int4_product", mutates_args=())
def int4_product(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    """x_MC @ weight.T + bias, of a weight that codes stand for: [M, N] in the dtype of x."""
    return F.linear(x_MC, from_groups(codes_NB, scale_NG, x_MC.shape[1], x_MC.dtype), bias_N)


@int4_product.register_fake
def _(x_MC: Tensor, codes_NB: Tensor, scale_NG: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_MC.new_empty((x_MC.shape[0], codes_NB.shape[0]))


class Quantized(nn.Module):
    """The weight of a product, or a table, in a kind of quantization.KINDS."""

    def __init__(self, kind: str, rows: int, channels: int, device: torch.device | str | None = None):
        super().__init__()
        stored = KINDS[kind]
        for name, shape in zip(("codes", "scale"), stored.shapes((rows, channels)), strict=True):
            empty = torch.empty(shape, dtype=getattr(torch, getattr(stored, name)), device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.kind, self.channels = kind, channels

    def store(self, weight_NC: Tensor) -> None:
        """Quantises a weight where it lies."""
        codes, scale = to_kind(weight_NC, self.kind)
        self.codes.data.copy_(codes)
        self.scale.data.copy_(scale)

    def rows(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        """What some rows stand for, in float32: [..., C]. take: those rows of the codes, and of the scales."""
        dtype = self.codes.dtype
        if dtype.is_floating_point:  # which not every torch takes rows of, on a GPU
            codes, scale = take(self.codes.view(torch.uint8)).view(dtype), take(self.scale)
        else:
            codes, scale = take(self.codes), take(self.scale)
        if KINDS[self.kind].group:
            return from_groups(codes, scale, self.channels, torch.float32)
        return codes.float() * scale[..., None]

    def forward(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """x: [B, T, C], or [B, C] for a single token of each row."""
        x_MC, scale_M = x.flatten(0, -2), None
        if KINDS[self.kind].group:
            out_MN = int4_product(x_MC, self.codes, self.scale, bias_N)
        else:
            if x.ndim > 2 and x.shape[1] > 1:
                x_MC, scale_M = to_codes(x_MC, self.codes.dtype)
            out_MN = quantized_product(x_MC, scale_M, self.codes, self.scale, bias_N, FLOATS[x.dtype])
        return out_MN.view(*x.shape[:-1], -1)
