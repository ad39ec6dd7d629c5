#!/bin/sh
# triton 3.6.0 for Hopper (sm_90), compiled here without a GPU: (words & mask) | bits with two constants takes two LOP3
# instructions a number, though one LOP3 computes any function of three words: it has room for one constant, and the other is not
# kept in a register for all numbers of a thread. The same by inline assembly, with both constants given as registers, takes one.
# Kernels that make floats of packed 4-bit codes consist of little else. Eight numbers a thread.
# Seen on 2026-11-30, x86-64, Python 3.11: 17 LOP3 as an expression, 9 by inline assembly, one of either for something else.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.6.0
cat > "$folder/kernels.py" <<'PYTHON'
import pathlib
import re
import subprocess

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


@triton.jit
def as_expression(x, out):
    at = tl.arange(0, 1024)
    words = tl.load(x + at)
    tl.store(out + at, ((words & 240) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0)


@triton.jit
def by_assembly(x, out):
    at = tl.arange(0, 1024)
    words = tl.load(x + at)
    mask, bits = tl.full((1,), 240, tl.int32), tl.full((1,), 0x4B000000, tl.int32)
    found = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words, mask, bits], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(out + at, found.to(tl.float32, bitcast=True) - 8388608.0)


def count(kernel):
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1)}
    source = ASTSource(fn=kernel, signature={"x": "*i32", "out": "*fp32"}, constexprs={}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    place = pathlib.Path(__file__).with_name("kernel.cubin")
    place.write_bytes(made.asm["cubin"])
    told = subprocess.run([TOOLS / "nvdisasm", "-c", place], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\bLOP3", told))


found = {kernel.__name__: count(kernel) for kernel in (as_expression, by_assembly)}
print("triton", triton.__version__, found)
assert found["as_expression"] - found["by_assembly"] == 8, "one instruction fewer for each of 8 numbers"
PYTHON
"$folder/venv/bin/python" "$folder/kernels.py"
