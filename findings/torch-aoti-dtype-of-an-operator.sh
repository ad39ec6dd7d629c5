#!/bin/sh
# torch 2.11.0: an AOTInductor package gives a custom operator, where that takes a dtype, the one whose number follows the one that
# it was exported with: float64 for float32, float32 for float16, float16 for int64. For bfloat16 it is a quantised dtype, with which
# the operator fails; the package goes on without its result, and says only that a tensor has no storage. A string reaches the operator as
# it is. The exported program itself is right, and so are packages of torch 2.13.0.
# Seen on 2026-11-30, x86-64, Python 3.11, on the CPU (2.11.0 is the CUDA build there is for Linux, some 3 GB):
#   2.11.0+cu130: {'float32': 'torch.float64', 'float16': 'torch.float32', 'int64': 'torch.float16', 'bfloat16': 'torch.quint8'}
#   2.13.0+cpu: {'float32': 'torch.float32', 'float16': 'torch.float16', 'int64': 'torch.int64', 'bfloat16': 'torch.bfloat16'}
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import sys
import warnings

import torch

warnings.simplefilter("ignore")
seen = []


@torch.library.custom_op("probe::filled", mutates_args=())
def filled(x: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    seen.append((str(dtype), name))
    return torch.zeros(x.shape, dtype=dtype)


@filled.register_fake
def _(x, dtype, name):
    return x.new_empty(x.shape, dtype=dtype)


class Program(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return filled(x, self.dtype, str(self.dtype)).float() + 1


found = {}
for dtype in (torch.float32, torch.float16, torch.int64, torch.bfloat16):
    name = str(dtype).removeprefix("torch.")
    program = torch.export.export(Program(dtype), (torch.ones(3),))
    program.module()(torch.ones(3))
    assert seen.pop() == (str(dtype), str(dtype))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{sys.argv[1]}/{name}.pt2")
    try:
        torch._inductor.aoti_load_package(path)(torch.ones(3))
    except RuntimeError as error:
        assert name == "bfloat16" and "API call failed" in str(error), error
    found[name], text = seen.pop()
    assert text == str(dtype)
print(f"{torch.__version__}: {found}")
assert (found == {name: f"torch.{name}" for name in found}) == (sys.argv[2] == "right")
if sys.argv[2] == "next":
    assert found == dict(float32="torch.float64", float16="torch.float32", int64="torch.float16", bfloat16="torch.quint8")
PYTHON
for version in 2.11.0:next 2.13.0:right; do
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install -q "torch==${version%:*}" numpy==2.4.6 setuptools
  PATH="$folder/venv/bin:$PATH" TORCHINDUCTOR_CACHE_DIR="$folder/cache-${version%:*}" CUDA_VISIBLE_DEVICES='' \
    "$folder/venv/bin/python" "$folder/probe.py" "$folder" "${version#*:}" 2> "$folder/errors" || { tail -5 "$folder/errors"; exit 1; }
  rm -rf "$folder/venv"
done
