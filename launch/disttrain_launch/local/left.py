"""Processes that the code of a run has started and that are still running when it has ended."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from disttrain.layout import LAUNCHER_PID

_ENDING_S = 1.0  # a helper of the worker's own, such as multiprocessing's, ends by itself just after it


def left_behind(system: Path = Path("/proc")) -> dict[int, str]:
    """Names of the processes, by their number, that descend from workers of this launcher: by their environment.

    None is found where the system has no /proc, or where a process got another environment.
    """
    patience = time.monotonic() + _ENDING_S
    while (found := _descendants(system)) and time.monotonic() < patience:
        time.sleep(0.05)
    return found


def _descendants(system: Path) -> dict[int, str]:
    mark = f"{LAUNCHER_PID}={os.getpid()}".encode()
    found = {}
    for folder in system.glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "comm").read_text(errors="replace").strip()
    return found
