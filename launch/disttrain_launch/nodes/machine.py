"""This machine, as a place for workers of a run on several."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

from disttrain.distributed.launched import NODE_LAUNCHER
from disttrain.distributed.lease import Lease
from disttrain.distributed.ports import reserved_port
from disttrain.layout import LAUNCHED_BY, LEASE, NODE_SLOT
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.worker import Worker
from disttrain_launch.nodes.node import Node

_SPARE_PORTS = 4  # more than are needed before a message that one is used has come to the leading machine


@dataclass(frozen=True)
class Place:
    """A worker's place in a run, as the leading machine gives it.

    Args:
        rank, local_rank, size, local_size: as the worker's environment has them.
        host, port: where the workers meet.
        slot, num_slots: this machine's among those that may take part.
        joins: whether the run is under way.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    host: str
    port: int
    slot: int
    num_slots: int
    joins: bool = False

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Place:
        """The place in a message. Raises TypeError or ValueError for what is none."""
        host, joins = str(fields.pop("host")), bool(fields.pop("joins"))
        return cls(**{name: int(value) for name, value in fields.items()}, host=host, joins=joins)

    def fields(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)


@dataclass(frozen=True)
class _PlacedGroup(WorkerGroup):
    """A worker of this machine among those of others: `size` is of this machine."""

    place: Place | None = None
    lease: Lease | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the worker inherits besides its own."""
        return () if self.lease is None else (self.lease.fileno(),)

    def variables(self, rank: int, port: str) -> dict[str, str]:
        """What is set for the worker."""
        place = self.place
        assert place is not None
        return super().variables(rank, port) | {
            "LOCAL_RANK": str(place.local_rank),
            "WORLD_SIZE": str(place.size),
            "LOCAL_WORLD_SIZE": str(place.local_size),
            "MASTER_ADDR": place.host,
            LAUNCHED_BY: NODE_LAUNCHER,
            NODE_SLOT: f"{place.slot} {place.num_slots}",
            LEASE: "" if self.lease is None else str(self.lease.fileno()),
        }


class Machine:
    """Starts workers here. Whatever happens, none outlives the block."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.name = socket.gethostname()
        self.address = node.address or "127.0.0.1"
        self.capacity = int(node.workers)
        self.is_fit = True  # as a `RemoteMachine` has it
        self._until_the_end = ExitStack()
        self._lease: Lease | None = None
        self._workers: list[Worker] = []
        # Each worker reads its standard input and ends when that closes: however this process dies, the kernel does it.
        self._lifeline = os.pipe()
        self._console = os.dup(1), os.dup(2)
        self._spare_ports = [self._reserve() for _ in range(_SPARE_PORTS)]

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        for descriptor in (*self._lifeline, *self._console):
            os.close(descriptor)
        self._until_the_end.close()

    @property
    def spare_ports(self) -> list[int]:
        """Ports at which nobody listens, and nobody else can."""
        return self._spare_ports[:]

    def take_port(self, port: int | None = None) -> int:
        """One of them (or this one), which is in use from now on: another is reserved in its place."""
        taken = port if port in self._spare_ports else self._spare_ports[0]
        assert taken is not None
        self._spare_ports.remove(taken)
        self._spare_ports.append(self._reserve())
        return taken

    def _reserve(self) -> int:
        return self._until_the_end.enter_context(reserved_port())

    def leased(self) -> Lease:
        """The lease on which all workers run that are started here from now on."""
        self._lease = self._until_the_end.enter_context(closing(Lease()))
        return self._lease

    def start(self, place: Place) -> Worker:
        """A worker at this place."""
        group = _PlacedGroup(self._node.arguments, place.local_size, place=place, lease=self._lease)
        worker = Worker(group, place.rank, place.port, self._lifeline[0], self._console, joins=place.joins)
        self._workers.append(worker)
        return worker

    def drop(self, worker: Worker) -> None:
        """End a worker, if it runs, and let go of it."""
        worker.kill()
        worker.close()
        self._workers.remove(worker)

    def clear(self) -> None:
        """End all workers."""
        for worker in self._workers[:]:
            self.drop(worker)
