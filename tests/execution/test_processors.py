from __future__ import annotations

from pathlib import Path

import pytest

from segfit.execution import processors
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
