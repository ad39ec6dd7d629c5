#!/bin/sh
# torch 2.13.0 (CPU build): ProcessGroupGloo.abort() does not wake who waits for a collective that another rank has not joined.
# The wait goes on for the timeout that the group was made with, and only then fails. So a program that notices that a rank hangs has
# to look for itself: wait(timeout) with a short one raises, the collective goes on, and it can be waited for again.
# Seen on 2026-11-30, x86-64, Python 3.11, with a timeout of 6 seconds:
#   abort() took 0.0 s; 2 s later: RuntimeError, completed False; in the end: RuntimeError after 6 s
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions

store, groups = dist.HashStore(), {}


def join(rank):
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=6)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    groups[rank] = dist.ProcessGroupGloo(store, rank, 2, options)


joining = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
for thread in joining:
    thread.start()
for thread in joining:
    thread.join()
begun = time.monotonic()
work = groups[0]._allgather_base(torch.zeros(2), torch.ones(1), AllgatherOptions())
groups[0].abort()
took = time.monotonic() - begun
try:
    work.wait(timedelta(seconds=2))
    soon = "no error"
except RuntimeError:
    soon = "RuntimeError"
completed = work.is_completed()
try:
    work.wait()
    end = "no error"
except RuntimeError:
    end = "RuntimeError"
whole = time.monotonic() - begun
print(f"abort() took {took:.1f} s; 2 s later: {soon}, completed {completed}; in the end: {end} after {whole:.0f} s")
assert took < 1
assert (soon, completed, end) == ("RuntimeError", False, "RuntimeError")
assert 5 < whole < 9
PYTHON
