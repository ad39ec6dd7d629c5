#!/bin/sh
# torch 2.13.0 with onnxscript 0.7.2, onnxruntime 1.32.0: of bytes (uint8) shifted to the right by a number, torch.onnx.export
# makes a graph that ends in a Where of numbers with a sign (int8), under an output that it declares as uint8. onnxruntime refuses
# to load it, and onnx's checker finds nothing wrong without inferring types. Only where the exporter's own optimisation runs, which
# is the default, does the graph load and give what torch gives. The same shift of int32 loads either way.
# Seen on 2026-11-30, x86-64, Python 3.11:
#   uint8, optimised: equal to torch's
#   uint8, as it is translated: Type (tensor(uint8)) of output arg (rshift) ... does not match expected type (tensor(int8)).
#   int32, as it is translated: equal to torch's
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import onnx
import onnxruntime as ort
import torch


class Shift(torch.nn.Module):
    def forward(self, x):
        return x >> 4


def outcome(dtype, optimize):
    x = torch.arange(256).to(dtype)
    program = torch.onnx.export(Shift(), (x,), dynamo=True, verbose=False, opset_version=24, optimize=optimize)
    onnx.checker.check_model(program.model_proto)
    try:
        session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error).partition("Type Error: ")[2]
    (name,) = [given.name for given in session.get_inputs()]
    return (session.run(None, {name: x.numpy()})[0] == (x >> 4).numpy()).all().item()


found = [outcome(torch.uint8, True), outcome(torch.uint8, False), outcome(torch.int32, False)]
print("torch", torch.__version__, "onnxruntime", ort.__version__, *found, sep="\n  ")
assert found[0] is True, "the optimised one has changed"
assert "tensor(uint8)" in str(found[1]) and "does not match expected type (tensor(int8))" in str(found[1]), "bytes"
assert found[2] is True, "that of int32 has changed"
PYTHON
