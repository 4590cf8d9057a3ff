"""What a process leaves behind, by listing: processes with a mark in their environment, files, shared memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path


def marked_processes(mark: str) -> list[str]:
    """The commands of all processes whose environment was started with this text, zombies included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()!r}")
            except OSError:
                continue
    return found


def descendants(pid: int) -> list[int]:
    """The process's children, their children, and so on."""
    found = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        for task in tasks:
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


def open_files(pid: int) -> int:
    """How many file descriptors the process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_kib(pid: int) -> int:
    """The process's resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def shared_memory_of(pids: Iterable[int]) -> list[str]:
    """The names in /dev/shm that these processes gave, as torch does: others use it at the same time."""
    return [name for name in os.listdir("/dev/shm") if {*re.findall(r"\d+", name)} & {*map(str, pids)}]
