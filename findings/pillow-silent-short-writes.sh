#!/bin/sh
# Pillow 13.0.0: where only part of a picture fits, save may raise nothing and leave a file that is cut off. BMP and TIFF do
# so here, JPEG in the same way with other sizes; the encoder's last write to the file is not compared with what was asked
# for. A picture that is encoded in memory and written by Python raises OSError.
# A limit on the size of files stands for a full disk here; a tmpfs of 64 KiB behaves alike.
# Seen on 2026-11-28, x86-64 Linux, Python 3.11:
#   BMP of 67854 bytes: nothing raised, 65536 bytes in the file; TIFF of 67640 bytes: the same
#   the same BMP through memory: OSError 27 File too large
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
import os
import pathlib
import resource
import signal

import PIL
from PIL import Image

LIMIT = 65536
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write beyond the limit fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
picture = Image.linear_gradient("L").resize((150, 150)).convert("RGB")


def saved(write, name):
    try:
        write(name)
    except OSError as error:
        return f"OSError {error.errno}"
    return os.path.getsize(name)


found = {}
for kind in ("bmp", "tiff"):
    memory = io.BytesIO()
    picture.save(memory, kind)
    whole = len(memory.getvalue())
    direct = saved(picture.save, f"direct.{kind}")
    through = saved(lambda name: pathlib.Path(name).write_bytes(memory.getvalue()), f"memory.{kind}")
    found[kind] = whole, direct, through
print("Pillow", PIL.__version__, "(whole, saved directly, through memory):", found)
for kind, (whole, direct, through) in found.items():
    assert whole > LIMIT and direct == LIMIT, f"{kind} is no longer cut off in silence"
    assert through == "OSError 27", kind
PYTHON
