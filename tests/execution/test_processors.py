from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from segfit.execution import processors
from segfit.execution.memory import group_memory_left
from segfit.execution.processors import available_workers, processor_quota


def _system(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/job/step\n", {"sys/fs/cgroup/job/cpu.max": "400000 100000\n"}, 4.0),
        (
            "0::/job/step\n",
            {
                "sys/fs/cgroup/job/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
                "sys/fs/cgroup/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        (
            "4:memory:/x\n1:cpu,cpuacct:/docker/abc\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (  # in a container without a name space of its own, the group is mounted at the root
            "1:cpu,cpuacct:/docker/abc\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "1:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("4:memory:/x\n", {"sys/fs/cgroup/memory/x/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_limits_of_control_groups_are_read(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float | None
) -> None:
    assert processor_quota(_system(tmp_path, groups, files)) == quota


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert processor_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "workers"), [(None, 6), (0.5, 1), (1.5, 2), (4.0, 4), (64.0, 6)])
def test_workers_follow_affinity_and_quota(quota: float | None, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(processors, "processor_quota", lambda: quota)
    assert available_workers() == workers


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "300\n"}, 700),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "300\n"}, None),
        (  # kept files are given back when memory is asked for
            "0::/job\n",
            {
                "sys/fs/cgroup/job/memory.max": "1000\n",
                "sys/fs/cgroup/job/memory.current": "900\n",
                "sys/fs/cgroup/job/memory.stat": "anon 400\ninactive_file 500\n",
            },
            600,
        ),
        (
            "0::/job/step\n",
            {
                "sys/fs/cgroup/job/memory.max": "1000\n",
                "sys/fs/cgroup/job/memory.current": "900\n",
                "sys/fs/cgroup/job/step/memory.max": "500\n",
                "sys/fs/cgroup/job/step/memory.current": "100\n",
            },
            100,
        ),
        (
            "9:memory:/slurm/job_1\n",
            {
                "sys/fs/cgroup/memory/slurm/job_1/memory.limit_in_bytes": "2000\n",
                "sys/fs/cgroup/memory/slurm/job_1/memory.usage_in_bytes": "2100\n",
                "sys/fs/cgroup/memory/slurm/job_1/memory.stat": "total_inactive_file 300\n",
            },
            200,
        ),
        ("1:cpu:/x\n", {"sys/fs/cgroup/cpu/x/memory.max": "1\n", "sys/fs/cgroup/cpu/x/memory.current": "0\n"}, None),
    ],
)
def test_memory_that_control_groups_grant(tmp_path: Path, groups: str, files: dict[str, str], left: int | None) -> None:
    assert group_memory_left(_system(tmp_path, groups, files)) == left


def test_the_limits_of_the_process_count() -> None:
    code = """
import resource, sys
from segfit.execution.memory import free_memory_gb, process_memory_left
assert process_memory_left() is None
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, resource.RLIM_INFINITY))
print(process_memory_left(), free_memory_gb())
resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
print(process_memory_left())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, gigabytes, nothing = done.stdout.split()
    assert 0.5 * 2**30 < int(left) < 2**30
    assert float(gigabytes) < 1
    assert int(nothing) == 0
