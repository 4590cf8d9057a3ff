"""What the machine, or the container, gives a process: cores, memory, shared memory, open files."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from disttrain.distributed.control_groups import memory_limit
from disttrain.distributed.cores import cpu_quota, usable_cores
from disttrain.doctor.finding import Finding, failure, ok, warning

_SHARED_MEMORY = Path("/dev/shm")
_MIB = 1024**2
# A worker that has imported torch and holds a small model takes about 400 MiB.
_LITTLE_MEMORY = 1024 * _MIB
# What DataLoader workers hand over goes through it; containers get 64 MiB unless more is requested.
_LITTLE_SHARED_MEMORY = 512 * _MIB
# Each batch on its way from a DataLoader worker, each connection to another rank and each shard of a file takes some.
_FEW_FILES = 1024


def cores() -> Iterator[Finding]:
    """The processor cores that the workers of this machine share."""
    cores, quota = usable_cores(), cpu_quota()
    found = f"{cores} of this machine's {os.cpu_count()} are for workers"
    yield ok("cores", found + (f", by a CPU quota of {quota:g}" if quota is not None and int(quota) <= cores else ""))


def memory() -> Iterator[Finding]:
    """Memory that is free for workers, and the limit of the container or the batch job."""
    available, limit = psutil.virtual_memory().available, memory_limit()
    found = f"{_gib(available)} available" + (f", {_gib(limit)} allowed" if limit is not None else "")
    if min(available, limit or available) < _LITTLE_MEMORY:
        yield warning(
            "memory",
            found,
            "Each worker takes about 0.4 GiB before its model: close other programs, use fewer "
            "workers, or raise the container's memory limit.",
        )
    else:
        yield ok("memory", found)


def shared_memory(folder: Path = _SHARED_MEMORY) -> Iterator[Finding]:
    """The size of /dev/shm, through which DataLoader workers hand over batches."""
    if not folder.is_dir():
        yield ok("shared-memory", f"no {folder} on this system")
        return
    size = shutil.disk_usage(folder)
    found = f"{folder} has {_gib(size.total)}, {_gib(size.free)} of it free"
    if not os.access(folder, os.W_OK):
        yield failure("shared-memory", f"{folder} cannot be written", f"chmod 1777 {folder}, as root.")
    elif size.free < _LITTLE_SHARED_MEMORY:
        yield warning(
            "shared-memory",
            found,
            'Streamed data (data.layout = "stream") may fail with a bus error: start the '
            "container with --shm-size=2g, give the pod a memory-backed emptyDir at /dev/shm, or set "
            "data.workers = 0.",
        )
    else:
        yield ok("shared-memory", found)


def open_files() -> Iterator[Finding]:
    """How many files a process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        yield warning(
            "open-files",
            f"a process may open {soft} files",
            f"Raise it to {_FEW_FILES} or more: ulimit -n {_FEW_FILES}, or LimitNOFILE in the service's unit.",
        )
    else:
        yield ok("open-files", "no limit" if soft == resource.RLIM_INFINITY else f"a process may open {soft:,} files")


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / _MIB:.0f} MiB"
