"""Which cores a worker runs on, where a machine has several NUMA nodes: memory of another node is slower to reach."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def node_of(gpu: str | None, devices: Path = _PCI_DEVICES) -> int | None:
    """The NUMA node that a GPU is connected to, by its PCI address as in 0000:17:00.0; None if that is not known."""
    if gpu is None:
        return None
    try:
        node = int((devices / gpu / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say


def cores_for(
    local_rank: int, local_size: int, allowed: set[int], nodes: Path = _NODES, *, near: int | None = None
) -> set[int] | None:
    """The cores of the NUMA node that a worker should stay on; None where there is nothing to choose.

    That is the node `near` its GPU, if it has cores for it. Otherwise the workers of a machine are dealt out over the
    nodes in runs, so that neighbours share one. Only cores of `allowed` count, and a node without any is none.
    """
    found = {}
    for path in sorted(nodes.glob("node[0-9]*"), key=lambda path: int(path.name.removeprefix("node"))):
        cores = _parsed((path / "cpulist").read_text()) & allowed
        if cores:
            found[int(path.name.removeprefix("node"))] = cores
    if len(found) < 2 or local_size < len(found):
        return None  # one node; or so few workers that each may want the memory of several
    return found[near] if near in found else list(found.values())[local_rank * len(found) // local_size]


@contextmanager
def near_memory(local_rank: int, local_size: int, gpu: str | None = None) -> Iterator[None]:
    """Keep this thread, and those that it starts, to the cores of one NUMA node while the block runs, if that helps.

    `gpu` is the PCI address of the worker's GPU: what it reads should not come from the other end of the machine.
    """
    allowed: set[int] | None = None
    with suppress(OSError, ValueError, AttributeError):  # no Linux, a container that hides it: nothing is bound
        allowed = set(os.sched_getaffinity(0))
        cores = cores_for(local_rank, local_size, allowed, near=node_of(gpu))
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
