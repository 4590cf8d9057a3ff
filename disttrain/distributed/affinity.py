"""Which cores a worker runs on, where a machine has several NUMA nodes: memory of another node is slower to reach."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def cores_for(local_rank: int, local_size: int, allowed: set[int], nodes: Path = _NODES) -> set[int] | None:
    """The cores of the NUMA node that a worker should stay on; None where there is nothing to choose.

    The workers of a machine are dealt out over the nodes in runs, so that neighbours share one. Only cores of `allowed`
    count, and a node without any is none.
    """
    found = []
    for path in sorted(nodes.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        cores = _parsed((path / "cpulist").read_text()) & allowed
        if cores:
            found.append(cores)
    if len(found) < 2 or local_size < len(found):
        return None  # one node; or so few workers that each may want the memory of several
    return found[local_rank * len(found) // local_size]


@contextmanager
def near_memory(local_rank: int, local_size: int) -> Iterator[None]:
    """Keep this thread, and those that it starts, to the cores of one NUMA node while the block runs, if that helps."""
    allowed: set[int] | None = None
    with suppress(OSError, ValueError, AttributeError):  # no Linux, a container that hides it: nothing is bound
        allowed = set(os.sched_getaffinity(0))
        cores = cores_for(local_rank, local_size, allowed)
        if cores is not None:
            os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if allowed is not None:
            with suppress(OSError):
                os.sched_setaffinity(0, allowed)


def _parsed(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8-11". Raises ValueError."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
