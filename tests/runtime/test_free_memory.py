"""What the host's memory has room for."""

import os

import pytest

from bagel_opt.runtime import free_memory as module
from bagel_opt.runtime.free_memory import free_memory

INFO = "MemTotal: 16000 kB\nMemFree: 100 kB\nMemAvailable: 9000 kB\n"
V1 = {"memory.limit_in_bytes": 5000, "memory.usage_in_bytes": 4000}
V2 = {"memory.max": 5000, "memory.current": 4000}


def system(root, groups):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(INFO)
    (root / "proc/self/cgroup").write_text(groups)


def cgroup(root, folder, values, prefix="", pages=(0, 0)):
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (place / name).write_text(f"{value}\n")
    stat = f"cache 7\n{prefix}inactive_file {pages[0]}\n{prefix}active_file {pages[1]}\n"
    (place / "memory.stat").write_text(stat)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "folder", "values", "prefix"),
    [
        ("0::/a/b\n", "a/b", V2, ""),
        ("0::/a/b\n", "a", V2, ""),
        ("0::/as/outside\n", "", V2, ""),
        ("9:name=systemd:/\n4:cpu,memory:/a\n0::/\n", "memory/a", V1, "total_"),
        ("4:memory:/as/outside\n", "memory", V1, "total_"),
    ],
    ids=["own", "one above", "a container's", "first version", "a container's, first version"],
)
def test_the_least_of_the_machines_and_of_its_cgroups(root, groups, folder, values, prefix):
    """Pages of files count as free."""
    system(root, groups)
    assert free_memory() == 9000 * 1024
    cgroup(root, folder, values, prefix, (200, 30))
    assert free_memory() == 5000 - 4000 + 230
    cgroup(root, folder, {**values, next(iter(values)): 10**9}, prefix)
    assert free_memory() == 9000 * 1024  # more than there is


def test_a_cgroup_without_a_limit(root):
    system(root, "0::/a\n")
    cgroup(root, "a", {**V2, "memory.max": "max"})
    assert free_memory() == 9000 * 1024


def test_a_system_that_does_not_say(root):
    assert free_memory() is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="not Linux")
def test_here():
    assert 0 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
