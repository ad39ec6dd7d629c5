#!/bin/sh
# transformers 5.24.0 writes a Qwen2 model's rope_theta into rope_parameters, and no longer beside it. 4.57.1 reads such a
# config.json without a word and takes its default of 10,000: all positions are rotated by wrong angles. The other way round,
# 5.24.0 reads what 4.57.1 wrote. Whoever saves a configuration anew with version 5 breaks it for readers of version 4.
# Seen on 2026-11-28, x86-64, Python 3.11:
#   written by 5.24.0: rope_theta absent, read by 4.57.1 as 10000.0; written by 4.57.1: read by 5.24.0 as 1000000.0
# bagel_opt reads rope_theta in both places (tests/files).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.1 5.24.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version"
    "$folder/$version/bin/python" -W ignore -c "
from transformers import Qwen2Config
Qwen2Config(rope_theta=1e6).save_pretrained('$folder/by-$version')"
done
new=$("$folder/4.57.1/bin/python" -W ignore -c "
import json
from transformers import Qwen2Config
written = json.load(open('$folder/by-5.24.0/config.json'))
print('rope_theta' in written, written['rope_parameters']['rope_theta'], Qwen2Config.from_pretrained('$folder/by-5.24.0').rope_theta)")
old=$("$folder/5.24.0/bin/python" -W ignore -c "
from transformers import Qwen2Config
print(Qwen2Config.from_pretrained('$folder/by-4.57.1').rope_parameters['rope_theta'])")
echo "written by 5.24.0 (rope_theta on top, in rope_parameters, as 4.57.1 reads it): $new"
echo "written by 4.57.1, as 5.24.0 reads it: $old"
[ "$new" = "False 1000000.0 10000.0" ] && [ "$old" = "1000000.0" ] || { echo "this has changed" >&2; exit 1; }
