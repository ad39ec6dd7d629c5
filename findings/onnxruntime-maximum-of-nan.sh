#!/bin/sh
# onnxruntime 1.32.0 on the CPU, ONNX opset 24: ReduceMax and ArgMax pass over a NaN that is not the first of the values,
# where PyTorch and NumPy give NaN and its place. ReduceSum and Softmax keep it. So a graph that looks for damaged numbers
# by their largest finds none, and the argmax of broken logits is some token.
# Seen on 2026-11-28, x86-64, Python 3.11:
#   ReduceMax [1. nan 3.] -> 3.0, numpy nan
#   ArgMax [1. nan 3.] -> 2, numpy 1
#   ReduceSum [1. nan 3.] -> nan
#   ReduceMax [nan 1. 3.] -> nan
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper


def run(op, values):
    kind = TensorProto.INT64 if op == "ArgMax" else TensorProto.FLOAT
    node = helper.make_node(op, ["x"], ["y"], keepdims=0)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(values)])
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", kind, [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array(values, np.float32)})[0]


late, first = [1, np.nan, 3], [np.nan, 1, 3]
found = [run("ReduceMax", late), run("ArgMax", late), run("ReduceSum", late), run("ReduceMax", first)]
print("onnxruntime", ort.__version__, found, "numpy", np.max(late), np.argmax(late))
assert found[0] == 3 and np.isnan(np.max(late)), "ReduceMax has changed"
assert found[1] == 2 and np.argmax(late) == 1, "ArgMax has changed"
assert np.isnan(found[2]) and np.isnan(found[3]), "sums, or a NaN in the first place, have changed"
PYTHON
