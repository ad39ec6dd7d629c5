"""What the host's memory still has room for, as Linux says it. No torch."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def free_memory() -> int | None:
    """Bytes that this process can still take, of the machine and of each cgroup that it is in; None where the system does not
    say. Pages of files count as free: they leave memory when it is short."""
    return min(_places(), default=None)


def _places() -> Iterator[int]:
    try:
        for line in (ROOT / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
        groups = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        top, limit, usage, total = ROOT / "sys/fs/cgroup", "memory.max", "memory.current", ""
        if controllers:  # the first version of cgroups, in which each controller has a tree
            top, limit, usage, total = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            if "memory" not in controllers.split(","):
                continue
        folder = top / path.lstrip("/")  # in a container it may be named as outside, and only the top is there
        for place in (folder, *folder.parents):
            if place.is_relative_to(top):
                try:
                    stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                    files = sum(int(stat[f"{total}{kind}_file"]) for kind in ("active", "inactive"))
                    yield int((place / limit).read_text()) - int((place / usage).read_text()) + files
                except (OSError, ValueError, KeyError):  # not there, or without a limit
                    pass
