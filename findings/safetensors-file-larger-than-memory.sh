#!/bin/sh
# safetensors 0.8.0 with torch 2.13: safe_open with framework="pt" maps the whole file so that it may be written to, in private.
# Linux then counts all of it as memory that may be needed, and under its default rule (vm.overcommit_memory 0) refuses more
# than the machine has, memory and swap together: RuntimeError, "unable to mmap N bytes ... Cannot allocate memory (12)",
# though a tensor of 4 bytes is wanted. framework="np" reads the same file. So BAGEL's published file of 29 GB cannot be opened
# on a machine of 24 GB.
# Seen on 2026-11-29, x86-64 Linux, Python 3.11, 24 GB of memory and no swap:
#   a file of 50553020597 bytes, almost all of it a hole: np [0.0], pt RuntimeError
set -eu
test "$(cat /proc/sys/vm/overcommit_memory)" = 0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import os

import safetensors

have = sum(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith(("MemTotal", "SwapTotal")))
at = 2 * have * 1024
header = {
    "large": {"dtype": "U8", "shape": [at], "data_offsets": [0, at]},
    "small": {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]},
}
text = json.dumps(header).encode()
with open("large.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(file.tell() + at + 4)


def read(framework):
    try:
        with safetensors.safe_open("large.safetensors", framework) as file:
            return file.get_tensor("small").tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = {framework: read(framework) for framework in ("np", "pt")}
print("safetensors", safetensors.__version__, os.path.getsize("large.safetensors"), "bytes:", found)
assert found["np"] == [0.0], found
assert "Cannot allocate memory" in found["pt"], "torch's tensors of a large file can be read now"
PYTHON
