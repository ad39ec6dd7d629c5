"""What torch.onnx.export is to make of some operators, in place of its own translations."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from onnxscript.onnx_opset import opset24 as op

OPSET = 24


def linear(x, weight, bias=None):  # noqa: ANN001, ANN201  onnxscript values
    """Linear layers as Gemm, whose weight can lie in either order. The exporter's own translation transposes it, and
    the transposed copy would be a second one on disk."""
    *rows, channels = x.shape
    product = op.Gemm(x if len(rows) == 1 else op.Reshape(x, [-1, channels]), weight, bias, transB=1)
    return product if len(rows) == 1 else op.Reshape(product, [*rows, weight.shape[0]])


def upsample(x, size=None, factors=None):  # noqa: ANN001, ANN201
    """Each pixel four times, by nodes that run in any precision."""
    batch, channels, _, _ = x.shape
    wide = op.Expand(op.Unsqueeze(x, [3, 5]), [1, 1, 1, 2, 1, 2])
    sides = op.Mul(op.Shape(x, start=2), [2, 2])
    return op.Reshape(wide, op.Concat(op.Constant(value_ints=[batch, channels]), sides, axis=0))


def shift(codes, count):  # noqa: ANN001, ANN201
    """Of bytes, without a sign; the exporter's own translation makes signed numbers of them, which does not load
    (findings/torch-onnx-shift-of-bytes.sh)."""
    return op.BitShift(codes, op.CastLike(count, codes), direction="RIGHT")


TRANSLATIONS = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.upsample_nearest2d.vec: upsample,
    torch.ops.aten.__rshift__.Scalar: shift,
}


@contextmanager
def translations_made_once() -> Iterator[None]:
    """torch.onnx.export makes its table of all translations anew for each program, which takes longer than a small
    program does. In this block it gets copies of one table, where this torch still has its own so."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # no public part of torch
        yield
        return
    made = ONNXRegistry.from_torchlib(opset_version=OPSET)

    def copied(opset_version: int = OPSET) -> ONNXRegistry:
        if opset_version != OPSET:
            raise ValueError(f"translations to opset {opset_version}; these are to {OPSET}")
        table = copy.copy(made)
        table.functions = {target: list(found) for target, found in made.functions.items()}
        return table

    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(copied)):
        yield
