#!/bin/sh
# flash-attn-4 4.0.0b36: its wheel brings flash_attn/cute and no flash_attn/__init__.py. So where it alone is installed,
# importlib.util.find_spec("flash_attn") finds something and `import flash_attn` succeeds, as if FlashAttention 2 were there; but
# what is found is an empty namespace, without a version and without FlashAttention 2's functions. The spec's origin tells: it is
# None. Its own module has to be looked for by its full name.
# Seen on 2026-11-29, x86-64, Python 3.11:
#   find_spec: found, origin None
#   import: works, __version__ missing, flash_attn_func missing
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps flash-attn-4==4.0.0b36
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util

spec = importlib.util.find_spec("flash_attn")
print("find_spec:", f"found, origin {spec.origin}" if spec else "nothing")
import flash_attn

lacks = [name for name in ("__version__", "flash_attn_func") if not hasattr(flash_attn, name)]
print("import: works,", ", ".join(f"{name} missing" for name in lacks))
assert spec is not None and spec.origin is None
assert lacks == ["__version__", "flash_attn_func"]
PYTHON
