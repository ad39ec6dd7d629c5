#!/bin/sh
# onnx 1.22.0 and onnxruntime 1.32.0: where keys and values come from a Slice whose end is known only at run time, shape
# inference gives the output of Attention (opset 24, in its 3-D form) a last side of 0. A MatMul behind it is then refused
# when the model is loaded, though every size fits: the same model without the Slice, or with a Reshape behind Attention, runs.
# Seen on 2026-11-28, x86-64, Python 3.11:
#   whole: inferred [1, 4, 48], ran (1, 4, 8)
#   sliced: inferred [1, 4, 0], Incompatible dimensions for matrix multiplication
#   sliced and reshaped: ran (1, 4, 8)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HEADS, SIZE = 4, 12
WIDE = HEADS * SIZE
given = {
    "q": np.ones((1, 4, WIDE), np.float32),
    "k": np.ones((1, 6, WIDE), np.float32),
    "v": np.ones((1, 6, WIDE), np.float32),
    "end": np.array([5]),
}


def made(sliced, reshaped):
    constants = {
        "weight": np.ones((WIDE, 8), np.float32),
        "zero": np.array([0]),
        "axis": np.array([1]),
        "sides": np.array([1, 4, WIDE]),
    }
    nodes, keys, out = [], ["k", "v"], "attended"
    if sliced:
        nodes = [helper.make_node("Slice", [x, "zero", "end", "axis"], [f"{x}.cut"]) for x in keys]
        keys = [f"{x}.cut" for x in keys]
    nodes.append(helper.make_node("Attention", ["q", *keys], [out], q_num_heads=HEADS, kv_num_heads=HEADS))
    if reshaped:
        nodes.append(helper.make_node("Reshape", [out, "sides"], ["again"]))
        out = "again"
    nodes.append(helper.make_node("MatMul", [out, "weight"], ["y"]))
    kinds = {"end": TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), x.shape) for n, x in given.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", inputs, [output], [numpy_helper.from_array(x, n) for n, x in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def ran(model):
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error).rpartition("] ")[2]
    names = [x.name for x in session.get_inputs()]
    return session.run(None, {name: given[name] for name in names})[0].shape


def inferred(model):
    values = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    sides = values["attended"].type.tensor_type.shape.dim
    return [side.dim_value if side.HasField("dim_value") else None for side in sides]


whole, cut, again = made(False, False), made(True, False), made(True, True)
found = [inferred(whole), ran(whole)], [inferred(cut), ran(cut)], ran(again)
print("onnx", onnx.__version__, "onnxruntime", ort.__version__, *found, sep="\n  ")
assert found[0] == [[1, 4, WIDE], (1, 4, 8)], "the whole one has changed"
assert found[1][0] == [1, 4, 0] and "Incompatible dimensions" in found[1][1], "the sliced one has changed"
assert found[2] == (1, 4, 8), "the one with a Reshape has changed"
PYTHON
