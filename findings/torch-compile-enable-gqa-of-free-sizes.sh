#!/bin/sh
# torch 2.13.0 (CPU build): torch.compile(dynamic=True) cannot trace scaled_dot_product_attention(enable_gqa=a != b) where a and b
# are numbers of heads that it holds symbolic: the comparison is a SymBool, which the function does not take. With
# fullgraph=True that is an error, without it a graph break. bool() does not help; a branch on the comparison does.
# Seen on 2026-11-29, x86-64, Python 3.11:
#   eager: (2, 4, 9, 8)
#   compiled: Unsupported: ... argument 'enable_gqa' must be bool, not SymBool
#   compiled, with bool(): Unsupported: ... argument 'enable_gqa' must be bool, not SymBool
#   compiled, with a branch: (2, 4, 9, 8)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools
"$folder/venv/bin/python" - <<'PYTHON'
import re
import warnings

import torch
import torch.nn.functional as F

warnings.simplefilter("ignore")


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def attend_with_bool(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=bool(q.shape[1] != k.shape[1]))


def attend_with_branch(q, k, v):
    if q.shape[1] != k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=True, fullgraph=True, backend="eager")(q, k, v)


q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
want = attend(q, k, v)
print("eager:", tuple(want.shape))
for name, function in (("compiled", attend), ("compiled, with bool()", attend_with_bool)):
    try:
        told = str(compiled(function).shape)
    except Exception as error:
        message = re.search(r"argument 'enable_gqa'.*", str(error))
        told = f"{type(error).__name__}: ... {message.group() if message else error}"
    print(f"{name}:", told)
    assert "must be bool, not SymBool" in told
other = compiled(attend_with_branch)
print("compiled, with a branch:", tuple(other.shape))
assert torch.equal(other, want)
PYTHON
