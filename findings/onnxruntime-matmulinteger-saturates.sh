#!/bin/sh
# onnxruntime 1.32.0 on the CPU, x86-64 with AVX2 and without VNNI: MatMulInteger of uint8 and int8 adds two products up in
# 16 bits and cuts off what does not fit, so an operator that the ONNX specification defines on whole numbers gives other
# ones, without a word. Uint8 on both sides is exact, and so is a left side of 7 bits. onnxruntime's guide to quantisation
# warns of it for weights that are quantised; MatMulInteger's own specification knows no such limit.
# Needs such a processor: with VNNI it says so and ends.
# Seen on 2026-11-28, AMD EPYC, Python 3.11, of 255 x 127 over 64 channels:
#   uint8 x int8 -> 1048544, right is 2072640
#   uint8 x uint8 -> 2072640
#   7 bits: 127 x 127 -> 1032256, right is 1032256
set -eu
if grep -q -e avx512_vnni -e avx_vnni /proc/cpuinfo || ! grep -q avx2 /proc/cpuinfo; then
    echo "this processor has VNNI, or no AVX2: nothing to see here"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper


def product(a, b):
    """The largest of a product of [4, 64] and [64, 32], all of whose numbers are a and b."""
    kinds = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
    left, right = np.full((4, 64), a), np.full((64, 32), b)
    inputs = [helper.make_tensor_value_info(n, kinds[x.dtype.name], x.shape) for n, x in (("a", left), ("b", right))]
    output = helper.make_tensor_value_info("y", TensorProto.INT32, [4, 32])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"a": left, "b": right})[0].max())


right = 255 * 127 * 64
mixed = product(np.uint8(255), np.int8(127))
alike = product(np.uint8(255), np.uint8(127))
seven = product(np.uint8(127), np.int8(127))
print("onnxruntime", ort.__version__, "uint8 x int8", mixed, "uint8 x uint8", alike, "right", right, "7 bits", seven)
assert mixed == 32767 * 32, "uint8 x int8 has changed"
assert alike == right, "uint8 x uint8 has changed"
assert seven == 127 * 127 * 64, "7 bits have changed"
PYTHON
