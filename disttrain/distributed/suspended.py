"""Workers that a signal has stopped (SIGSTOP): nothing else reveals them. For both kinds of launcher; no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

LOOK_EVERY_S = 2.0
"""How often a check is worthwhile."""


class Suspended:
    """Which workers of this machine are stopped, reported once each time."""

    def __init__(self) -> None:
        self._looked_at = time.monotonic()
        self._looks: dict[int, int] = {}  # by process id: how often in a row it was found stopped

    def news(self, processes: Mapping[int, int]) -> list[str]:
        """Messages on these running workers (rank: process id) since the previous call."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return []
        self._looked_at = time.monotonic()
        self._looks = {pid: self._looks.get(pid, 0) + 1 for pid in processes.values() if _is_stopped(pid)}
        # At the second look: some tools stop a process for a moment to look at it.
        return [
            f"rank {rank} (process {pid}) is stopped (SIGSTOP) and the job waits for it; resume it with: kill -CONT "
            f"{pid}"
            for rank, pid in processes.items()
            if self._looks.get(pid) == 2
        ]


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
