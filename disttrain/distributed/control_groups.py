"""The control groups that this process is in (Linux, version 1 and 2): what a container or a batch system allows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # what version 1 has for no limit depends on the size of a page


def folders(controller: str, root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> list[tuple[int, Path]]:
    """The version (1 or 2) and the folder of each group that may limit what `controller` ("cpu", "memory") controls."""
    try:
        lines = membership.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found: list[tuple[int, Path]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [(2, folder) for folder in _with_those_around(root, path)]
        elif controller in controllers.split(","):
            found += [(1, folder) for folder in _with_those_around(root / controller, path)]
    return found


def memory_limit(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """How much memory the control groups of this process allow it, in bytes; None: no limit."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = []
    for version, folder in folders("memory", root, membership):
        try:
            limits.append(int((folder / names[version]).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _with_those_around(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group, and those of the groups around it, each of which may have a limit of its own.

    A container often sees the path of the host here, of which it has the root alone.
    """
    group = PurePosixPath(path)
    if ".." not in group.parts:
        for one in (group, *group.parents):
            yield root / one.relative_to("/")
