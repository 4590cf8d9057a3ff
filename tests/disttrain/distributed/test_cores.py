"""How many cores a process may use: the machine's, fewer by affinity, fewer by a container's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disttrain.distributed import cores
from disttrain.distributed.cores import cpu_quota, usable_cores


def quota(tmp_path: Path, membership: str, files: dict[str, str]) -> float | None:
    """The quota that these files of /sys/fs/cgroup make for this line of /proc/self/cgroup."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    return cpu_quota(tmp_path, tmp_path / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),  # a container with a control group name space of its own
        ("0::/pods/one\n", {"cpu.max": "150000 100000\n"}, 1.5),  # and with the host's path, which it cannot see
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),  # systemd: of the slice
        ("0::/a\n", {"cpu.max": "300000 100000\n", "a/cpu.max": "800000 100000\n"}, 3.0),
        ("0::/../x\n", {"cpu.max": "300000 100000\n"}, None),
        ("3:cpu,cpuacct:/docker/1\n0::/\n", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ("3:cpuset:/\n2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_a_control_group(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    assert quota(tmp_path, membership, files) == expected


def test_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "nothing") is None


@pytest.mark.parametrize(("allowed", "expected"), [(None, 64), (4.0, 4), (2.5, 2), (0.1, 1), (100.0, 64)])
def test_a_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, allowed: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: allowed)
    assert usable_cores() == expected
