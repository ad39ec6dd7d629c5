"""Products with weights in 8 and 4 bits as ONNX nodes, for ONNX Runtime's CPU provider and its CUDA provider.

M tokens, C channels in, N channels out, G groups of a row. What is not finite is lost in a largest number, and in whole
numbers; a sum that is nothing but zero or NaN brings it back.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.export.onnx_fused import DOMAIN
from bagel_opt.files.parameters import in_onnx
from bagel_opt.model.quantized import GROUP, LEAST, Quantized, to_kind
from bagel_opt.quantization import BLOCK, KINDS

Node = torch.onnx.ops.symbolic
# Of a token's codes: from 64 - 63 to 64 + 63. ONNX Runtime 1.32 adds two products at a time in 16 bits on processors without
# VNNI, and cuts off what does not fit: with all 8 bits of both sides they do not.
LARGEST, ZERO = 63, 64
COMPUTE_IN_8_BITS = 4  # MatMulNBits' accuracy_level


def as_stored(weight_NC: Tensor, kind: str, device: str | None) -> tuple[Tensor, Tensor]:
    """(codes, scale) as the nodes of a product take them on that device. None: of a table, of which Gather takes rows, as they
    lie."""
    found = to_kind(weight_NC, kind)
    if device is None:
        return found
    shapes = in_onnx(kind, device, *weight_NC.shape)
    return tuple(as_read(tensor, kind, device, shape) for tensor, shape in zip(found, shapes, strict=True))


def as_read(quantized: Tensor, kind: str, device: str, shape: tuple[int, ...]) -> Tensor:
    """The codes or the scales of model/quantized.py as the nodes of a product take them, in that shape."""
    if kind != "int8":
        return quantized.reshape(shape)
    if device == "cpu":
        return quantized.t()
    if quantized.dtype == torch.int8:  # to codes without a sign, of which 128 is zero
        return (F.pad(quantized, (0, -quantized.shape[1] % BLOCK)).view(torch.uint8) ^ 128).view(shape)
    return quantized.repeat_interleave(shape[0] // len(quantized))


class Product(nn.Module):
    """In place of `Linear.quantized`: the weight of a product, as the nodes for the CPU take it.

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
        return self._of_blocks(x, self.scale.float(), bits=4, block_size=GROUP, accuracy_level=COMPUTE_IN_8_BITS)

    def _of_blocks(self, x: Tensor, scale: Tensor, **about: int) -> Tensor:
        about = {"K": self.channels, "N": self.rows, **about}
        shape = (*x.shape[:-1], self.rows)
        return Node(f"{DOMAIN}::MatMulNBits", (x, self.codes, scale), about, dtype=x.dtype, shape=shape, version=1)

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


class GpuProduct(Product):
    """The same for CUDA: what comes in stays as it is. For a few tokens ONNX Runtime reads the codes themselves, for more it
    makes floats of all of them first, in memory that the next product takes again."""

    def forward(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        bits, block = (4, GROUP) if KINDS[self.kind].group else (8, BLOCK)
        out_MN = self._of_blocks(x.reshape(-1, self.channels), self.scale, bits=bits, block_size=block)
        return (out_MN if bias_N is None else out_MN + bias_N).view(*x.shape[:-1], self.rows)


class GpuTable(Quantized):
    """A table in 4 bits for CUDA, where ONNX Runtime has no operators on the bits of whole numbers."""

    def rows(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        pairs, scale = take(self.codes).float(), take(self.scale).float()
        high = (pairs / 16).floor()
        numbers = torch.stack((pairs - 16 * high, high), dim=-1).view(*scale.shape, GROUP) - 8
        return (numbers * scale[..., None]).flatten(-2)[..., : self.channels]


def product_for(device: str, kind: str, shapes: Sequence[tuple[int, ...]], like: nn.Linear) -> Product:
    return (Product if device == "cpu" else GpuProduct)(kind, shapes, like)


def table_for(device: str, kind: str, like: nn.Embedding) -> Quantized:
    made = GpuTable if device == "cuda" and KINDS[kind].group else Quantized
    return made(kind, like.num_embeddings, like.embedding_dim, "meta")
