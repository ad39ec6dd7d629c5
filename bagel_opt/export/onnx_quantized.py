"""Products with weights in 8 and 4 bits as ONNX nodes, for ONNX Runtime's CPU provider.

M tokens, C channels in, N channels out, G groups of a row. What is not finite is lost in a largest number, and in whole
numbers; a sum that is nothing but zero or NaN brings it back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bagel_opt.export.onnx_fused import DOMAIN
from bagel_opt.model.quantized import GROUP, LEAST, to_kind
from bagel_opt.quantization import KINDS

Node = torch.onnx.ops.symbolic
# Of a token's codes: from 64 - 63 to 64 + 63. ONNX Runtime 1.32 adds two products at a time in 16 bits on processors without
# VNNI, and cuts off what does not fit: with all 8 bits of both sides they do not.
LARGEST, ZERO = 63, 64
COMPUTE_IN_8_BITS = 4  # MatMulNBits' accuracy_level


def as_stored(weight_NC: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) as the nodes take them."""
    codes, scale = to_kind(weight_NC, kind)
    return as_read(codes, kind), as_read(scale, kind)


def as_read(quantized: Tensor, kind: str) -> Tensor:
    """The codes or the scales of model/quantized.py as the nodes take them."""
    if kind == "int8":
        return quantized.t()
    if quantized.dtype == torch.uint8:
        return quantized.unflatten(1, (-1, GROUP // 2))
    return quantized.float().flatten()


class Product(nn.Module):
    """In place of `Linear.quantized`: the weight of a product, as these nodes take it."""

    def __init__(self, kind: str, shapes: Sequence[tuple[int, ...]], like: nn.Linear):
        super().__init__()
        self.kind, self.channels, self.rows = kind, like.in_features, like.out_features
        dtypes = getattr(torch, KINDS[kind].codes), torch.float32
        for name, shape, dtype in zip(("codes", "scale"), shapes, dtypes, strict=True):
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        # A Reshape before each, without which ONNX Runtime 1.32 takes the output of an Attention for one of another size.
        x_MC = x.reshape(-1, self.channels)
        out_MN = self._whole(x_MC) if self.kind == "int8" else self._in_groups(x_MC)
        out_MN = out_MN + x_MC.sum(-1, keepdim=True) * 0
        return (out_MN if bias_N is None else out_MN + bias_N).view(*x.shape[:-1], self.rows)

    def _whole(self, x: Tensor) -> Tensor:
        """Codes of tokens, each with a scale of its own, which DynamicQuantizeLinear has not."""
        scale = (x.abs().amax(-1, keepdim=True) * (1 / LARGEST)).clamp(min=LEAST)
        codes = ((x / scale).round() + ZERO).to(torch.uint8)
        given = codes, self.codes, torch.tensor(ZERO, dtype=torch.uint8)
        sums = Node("MatMulInteger", given, {}, dtype=torch.int32, shape=(*x.shape[:-1], self.rows), version=10)
        return sums.float() * scale * self.scale

    def _in_groups(self, x: Tensor) -> Tensor:
        about = {
            "K": self.channels,
            "N": self.rows,
            "bits": 4,
            "block_size": GROUP,
            "accuracy_level": COMPUTE_IN_8_BITS,
        }
        given = x, self.codes, self.scale
        shape = (*x.shape[:-1], self.rows)
        return Node(f"{DOMAIN}::MatMulNBits", given, about, dtype=x.dtype, shape=shape, version=1)
