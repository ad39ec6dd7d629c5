#!/bin/sh
# onnxruntime 1.32.0, Python: once a process has called set_global_thread_pool_sizes, every InferenceSession with default
# options is refused, whoever makes it: the default asks for threads of the session's own. So a library that sets the pool
# for its own sessions breaks those of all others, and nothing takes the call back.
# Seen on 2026-11-28, x86-64, Python 3.11:
#   before: a session with default options runs
#   after: RuntimeError: ... use_per_session_threads must be false
#   a session whose options say use_per_session_threads = False runs
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
cat > "$folder/model.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10).SerializeToString()


def run(options=None):
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([-1, 1], np.float32)})[0].tolist()


if sys.argv[1] == "alone":
    print("onnxruntime", ort.__version__, "alone:", run())
    sys.exit()
ort.set_global_thread_pool_sizes(1, 1)
try:
    run()
except Exception as error:
    print("with a global pool:", type(error).__name__, str(error).splitlines()[-1])
    assert "use_per_session_threads must be false" in str(error), "the refusal has changed"
else:
    sys.exit("default sessions beside a global pool run now")
options = ort.SessionOptions()
options.use_per_session_threads = False
print("with a global pool, and asked for it:", run(options))
PYTHON
"$folder/venv/bin/python" "$folder/model.py" alone
"$folder/venv/bin/python" "$folder/model.py" global
