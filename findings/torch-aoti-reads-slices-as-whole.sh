#!/bin/sh
# torch 2.13.0 (CPU build): an AOTInductor package reads each input as if it lay in memory as the example did that it was
# compiled with. A slice of a larger tensor, of a shape that is allowed, is read past its rows' ends: the result is wrong, and
# nothing is said. The exported program itself, and the package given a contiguous copy, are right.
# Seen on 2026-11-29, x86-64, Python 3.11:
#   the program: [[0, 2, 4, 6, 8, 10], [16, 18, 20, 22, 24, 26]]
#   its package: [[0, 2, 4, 6, 8, 10], [12, 14, 16, 18, 20, 22]]
#   its package, of a contiguous copy: [[0, 2, 4, 6, 8, 10], [16, 18, 20, 22, 24, 26]]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools
PATH="$folder/venv/bin:$PATH" TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import torch

warnings.simplefilter("ignore")


class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2


free = ({1: torch.export.Dim.DYNAMIC},)
program = torch.export.export(Double(), (torch.ones(2, 3),), dynamic_shapes=free)
path = torch._inductor.aoti_compile_and_package(program, package_path=f"{sys.argv[1]}/double.pt2")
package = torch._inductor.aoti_load_package(path)
part = torch.arange(16.0).view(2, 8)[:, :6]
want = [[0, 2, 4, 6, 8, 10], [16, 18, 20, 22, 24, 26]]
found = {
    "the program": program.module()(part),
    "its package": package(part),
    "its package, of a contiguous copy": package(part.contiguous()),
}
for name, result in found.items():
    print(f"{name}: {result.int().tolist()}")
assert found["the program"].tolist() == want
assert found["its package, of a contiguous copy"].tolist() == want
assert found["its package"].tolist() == [[0, 2, 4, 6, 8, 10], [12, 14, 16, 18, 20, 22]]
PYTHON
