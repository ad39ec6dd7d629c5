"""Products with weights in 8 and 4 bits as ONNX nodes, for ONNX Runtime's CPU provider.

M tokens, C channels in, N channels out, G groups of a row. What is not finite is lost in a largest number, and in whole
numbers; a sum that is nothing but zero or NaN brings it back.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.export.onnx_fused import DOMAIN
from bagel_opt.model.quantized import GROUP, LEAST, to_kind
from bagel_opt.quantization import KINDS

Node = torch.onnx.ops.symbolic
# Of a token's codes: from 64 - 63 to 64 + 63. ONNX Runtime 1.32 adds two products at a time in 16 bits on processors without
# VNNI, and cuts off what does not fit: with all 8 bits of both sides they do not.
LARGEST, ZERO = 63, 64
COMPUTE_IN_8_BITS = 4  # MatMulNBits' accuracy_level


def as_stored(weight_NC: Tensor, kind: str, table: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, scale) as the nodes take them."""
    codes, scale = to_kind(weight_NC, kind)
    return as_read(codes, kind, table), as_read(scale, kind, table)


def as_read(quantized: Tensor, kind: str, table: bool = False) -> Tensor:
    """The codes or the scales of model/quantized.py as the nodes take them. table: Gather takes their rows, as they lie."""
    if table:
        return quantized
    if kind == "int8":
        return quantized.t()
    if quantized.dtype == torch.uint8:
        return quantized.unflatten(1, (-1, GROUP // 2))
    return quantized.flatten()


class Product(nn.Module):
    """In place of `Linear.quantized`: the weight of a product, as these nodes take it.

    unpacked: whether ONNX Runtime may keep no copy of 4-bit codes in its kernel's order (onnx_graph.py, PACKED_CODES).
    """

    unpacked = False

    def __init__(self, kind: str, shapes: Sequence[tuple[int, ...]], like: nn.Linear):
        super().__init__()
        self.kind, self.channels, self.rows = kind, like.in_features, like.out_features
        dtypes = (getattr(torch, name) for name in (KINDS[kind].codes, KINDS[kind].scale))
        for name, shape, dtype in zip(("codes", "scale"), shapes, dtypes, strict=True):
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        # A Reshape before each, without which ONNX Runtime 1.32 takes the output of an Attention for one of another size.
        x_MC = x.reshape(-1, self.channels)
        product = self._whole if self.kind == "int8" else self._in_floats if self.unpacked else self._in_groups
        out_MN = product(x_MC)
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
        given = x, self.codes, self.scale.float()
        shape = (*x.shape[:-1], self.rows)
        return Node(f"{DOMAIN}::MatMulNBits", given, about, dtype=x.dtype, shape=shape, version=1)

    def _in_floats(self, x: Tensor) -> Tensor:
        """With floats made of the codes by nodes of ONNX's own, three times as fast as MatMulNBits makes them. Those of even
        channels are a byte's low bits, and those of odd ones its high bits: two halves of a product, each in turn in memory."""
        codes_NB = self.codes.flatten(1)
        rows, groups = self.codes.shape[:2]
        more = groups * GROUP - self.channels
        x_MC = F.pad(x, (0, more)) if more else x
        bits = {"dtype": torch.uint8, "shape": codes_NB.shape}
        low = Node("BitwiseAnd", (codes_NB, torch.tensor(15, dtype=torch.uint8)), {}, version=18, **bits)
        shift = torch.tensor(4, dtype=torch.uint8)
        high = Node("BitShift", (codes_NB, shift), {"direction": "RIGHT"}, version=11, **bits)
        scale_NG, eight_NG = self.scale.float().view(rows, groups), torch.full((rows, groups), 8, dtype=torch.uint8)
        about, summed = {"axis": 1, "block_size": GROUP // 2}, None
        for half, codes in enumerate((low, high)):
            given = codes, scale_NG, eight_NG
            weight = Node("DequantizeLinear", given, about, dtype=x.dtype, shape=codes_NB.shape, version=24)
            given = (x_MC[:, half::2], weight, *([] if summed is None else [summed]))
            summed = Node("Gemm", given, {"transB": 1}, dtype=x.dtype, shape=(x.shape[0], rows), version=13)
        return summed
