"""Where the ranks of a job find each other: the store that all share."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from disttrain.errors import DisttrainError

_BACKLOG = 2048  # as torch has it: all workers may connect at once
_TO_CONNECT = timedelta(seconds=1)
_LOOK_EVERY_S = 0.002


class MissingRanks(RuntimeError):
    """Some ranks have not come to the new process group."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"Timed out waiting for ranks {ranks}, which have not come to the new process group")
        self.ranks = ranks


@dataclass(frozen=True)
class MeetingPlace:
    """Where the ranks of a job find each other, and the worker that meets them there."""

    host: str
    port: int
    rank: int
    size: int
    is_alone: bool  # whether one machine has all workers
    timeout: timedelta = field(compare=False)

    def stores(self) -> tuple[Store, Store]:
        """The store that all ranks share, and its part for one group, whose keys are not those of the groups before."""
        store, numbers = _met_at(self)
        store.set_timeout(self.timeout)
        # "default_pg": as torch has it
        return store, PrefixStore("default_pg", PrefixStore(f"disttrain/group-{next(numbers)}", store))


@functools.cache
def _met_at(place: MeetingPlace) -> tuple[Store, Iterator[int]]:
    """The store of all ranks, and the numbers of the groups that meet there.

    Rank 0 serves it as long as its process lives. If it ended with a group, a rank that is quicker to join the next one
    would meet the store of the last. On one machine no other can reach it, unless torchrun serves it.
    """
    listener = _loopback_listener(place.host, place.port) if place.rank == 0 and place.is_alone else None
    store: Store
    if listener is not None:
        # torch's own socket would listen at every address of the machine.
        store = TCPStore(
            place.host,
            place.port,
            place.size,
            is_master=True,
            timeout=place.timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
    else:
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=place.timeout))
    return store, itertools.count(1)


def met_again(
    host: str, port: int, *, serves: bool, timeout: timedelta, hang_timeout_s: float, unless: Callable[[], bool]
) -> Store:
    """The store of all ranks at another port, of this machine or another, which one of them `serves`.

    Raises RuntimeError if `unless` holds meanwhile, and MissingRanks if it does not come in time.
    """
    store = _served_at(host, port) if serves else _reached_at(host, port, hang_timeout_s, unless)
    store.set_timeout(timeout)
    return store


@functools.cache  # for as long as the process lives: a group that fails to form is tried again there
def _served_at(host: str, port: int) -> Store:
    listener = _loopback_listener(host, port)
    if listener is None:
        return TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _reached_at(host: str, port: int, timeout_s: float, unless: Callable[[], bool]) -> Store:
    deadline = time.monotonic() + timeout_s
    while True:
        if _answers(host, port):  # torch would wait a second before it tries again
            store = _connected(host, port, lambda: unless() or time.monotonic() > deadline)
            if store is not None:
                return store
        if unless():
            raise RuntimeError("Timed out waiting for another worker, which is lost")
        if time.monotonic() > deadline:
            raise MissingRanks([0])
        time.sleep(_LOOK_EVERY_S)


def _connected(host: str, port: int, gives_up: Callable[[], bool]) -> Store | None:
    """The store served there; None if its process has just died, or has not answered until `gives_up` holds.

    For a process that is stopped, the system still accepts connections, and torch waits for an answer without end: so
    a thread does, which is left behind.
    """
    found: list[Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            found.append(TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_TO_CONNECT))

    thread = threading.Thread(target=connect, name="disttrain-meeting", daemon=True)
    thread.start()
    while thread.is_alive() and not gives_up():
        thread.join(_LOOK_EVERY_S)
    return found[0] if found else None


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _TO_CONNECT.total_seconds()):
            return True
    except OSError:
        return False


def _loopback_listener(host: str, port: int) -> socket.socket | None:
    """A socket that listens at MASTER_ADDR:MASTER_PORT; None if that is not loopback, or the agent's own store."""
    addresses = {"127.0.0.1": socket.AF_INET, "localhost": socket.AF_INET, "::1": socket.AF_INET6}
    if host not in addresses or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    listener = socket.socket(addresses[host], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1" if host == "localhost" else host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise DisttrainError(
            f"MASTER_ADDR:MASTER_PORT = {host}:{port}: {error.strerror}, so the workers cannot "
            "meet there. Wait for the job that has the port, or choose another."
        ) from error
    return listener
