"""How many processor cores this process may use. Whatever divides cores uses this; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from disttrain.distributed.control_groups import CONTROL_GROUPS, MEMBERSHIP, folders
from disttrain.distributed.launched import launched_by


def usable_cores() -> int:
    """The cores that this process may run on, and no more than its container's CPU quota pays for; at least 1.

    A quota of two and a half cores counts as two: a third thread would be paused in each period, and the others wait
    for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def num_threads(local_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """The CPU threads of a worker: OMP_NUM_THREADS if it is set, else its share of the machine's usable cores.

    torchrun sets OMP_NUM_THREADS=1 for several workers that have none: no user asked for that, and it cannot be
    distinguished from a request; `train.threads = 1` is.
    """
    text = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    asked = int(text) if text.isdecimal() else 0
    if asked == 1 and local_size > 1 and launched_by(environment) == "torchrun":
        asked = 0
    return asked or max(1, usable_cores() // local_size)


def cpu_quota(control_groups: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """How many cores' time the control groups of this process allow it (Linux, version 1 and 2); None: no limit."""
    read = {1: _version_1, 2: _version_2}
    quotas = [read[version](folder) for version, folder in folders("cpu", control_groups, membership)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _version_1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
