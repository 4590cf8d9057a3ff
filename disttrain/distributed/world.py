"""Which worker this is, and the process group it shares with the others.

The only reader of RANK-style variables, except where torch is not imported yet (see `launched`), and the only caller of
`init_process_group`. One worker has a process group too, so there is one path through the code, not two.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

# Its functions' default arguments hold the process group of the moment when it is first imported, as the first step of
# an optimizer does. Imported here, before there is one, it holds none: else `destroy_process_group` could not end
# gloo's threads, and one of them that is late aborts the process at its exit (pytorch/pytorch#179291, #190489).
import torch.distributed.nn.functional
from torch._C._distributed_c10d import HashStore, Store

from disttrain.distributed.affinity import near_memory
from disttrain.distributed.connections import Connections
from disttrain.distributed.cores import num_threads
from disttrain.distributed.device import choose_device, pci_address, refuse_a_mixture, why_not_gpus
from disttrain.distributed.launched import place_in, slot_in
from disttrain.distributed.meeting import MeetingPlace
from disttrain.distributed.shared_sums import SharedSums, shared_sums
from disttrain.errors import ConfigurationError
from disttrain.layout import JOINS

_AFTER_THE_WATCHDOG_S = 15.0
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class _Group:
    """The process group of this worker."""

    store: Store | None  # which all ranks share; None for a worker that has not joined them yet
    host: str  # of the store
    port: int
    timeout: timedelta  # of a collective
    hang_timeout_s: float
    most_sharing_memory: int  # workers, where it can be
    connections: Connections = field(default_factory=Connections)


@dataclass(frozen=True)
class World:
    """This worker's place among the workers of a job."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    host: str
    remark: str = ""
    """What a user should know about the device; empty if it is the expected one."""
    group: _Group | None = field(default=None, compare=False, repr=False)
    """What it takes to form the group anew; None for one worker."""
    slot: int | None = None
    """Of this machine among `num_slots`, where machines come and go and each keeps its own; else None."""
    num_slots: int = 0
    sums: SharedSums | None = field(default=None, compare=False, repr=False)
    """What adds up in memory that a machine's workers share; None where none do, and gloo or NCCL has to."""

    def leave_group(self) -> None:
        """Cut the connections of the process group, so that collectives raise RuntimeError here and on the peers."""
        if self.group is not None:
            self.group.connections.cut()
        if self.sums is not None:
            self.sums.cut()

    @property
    def group_is_broken(self) -> bool:
        """Whether a connection of the process group is."""
        return self.group is not None and self.group.connections.are_broken()

    @property
    def is_main(self) -> bool:
        """True for the one worker that writes checkpoints, the journal and the console."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True for one worker of each machine: the one that downloads and measures."""
        return self.local_rank == 0

    @property
    def node(self) -> int:
        """Which machine this is, counted from 0."""
        return self.rank // self.local_size

    @property
    def num_nodes(self) -> int:
        """How many machines take part."""
        return -(-self.size // self.local_size)


@contextmanager
def join_world(
    device: str = "auto",
    threads: int = 0,
    timeout_s: float = 600.0,
    *,
    most_sharing_memory: int = 0,
    is_whole_process: bool = False,
) -> Iterator[World]:
    """Join the job's process group, and leave it whatever happens.

    `threads` is the number of CPU threads of this worker; 0 shares the machine's cores out among its workers. Up to
    `most_sharing_memory` workers that compute on CPUs have `World.sums`, if some are on one machine and that can be.

    A collective that takes longer than `timeout_s` fails, so much later that a watchdog with this limit reports first.
    A launcher has set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without any of them
    this process is the only worker.

    For a process that `is_whole_process`, which has nothing left to do after the block and ends by `worker.leave`, a
    block that fails leaves the group as it is: NCCL may never come back from saying goodbye to ranks that still wait,
    and the failure is to be reported now.

    Raises ConfigurationError if the variables are incomplete, the device is not there, or there is a process group
    already, which stays as it is.
    """
    if dist.is_initialized():
        raise ConfigurationError(
            "this process already has a process group, and disttrain creates its own: leave "
            "out init_process_group, or call torch.distributed.destroy_process_group() before."
        )
    excepthook = sys.excepthook  # torch's own puts "[rank0]:" before each line, and stays for good
    rank, local_rank, size, local_size = place_in(os.environ)
    chosen = choose_device(device, local_rank, local_size, size)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or num_threads(local_size))
    timeout = timedelta(seconds=timeout_s + max(_AFTER_THE_WATCHDOG_S, timeout_s / 4))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    group: _Group | None = None
    sums: SharedSums | None = None
    slot, num_slots = slot_in(os.environ)
    is_alone = local_size == size and num_slots <= 1
    with near_memory(local_rank, local_size, pci_address(chosen)), _gloo_on_loopback(is_alone=is_alone):
        try:
            if size > 1 or num_slots > 1:
                host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                place = MeetingPlace(host, port, rank, size, is_alone, timeout)
                # Where the others meet by now, a worker that joins them later reads in its verdict.
                shared, store = (None, HashStore()) if joins_later() or size == 1 else place.stores()
                most_sharing = most_sharing_memory if chosen.type == "cpu" else 0
                group = _Group(shared, host, port, timeout, timeout_s, most_sharing)
            if joins_later():
                rank, local_rank, size, local_size = 0, 0, 1, 1
            if group is None or size == 1:
                dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
            else:
                _all_have_the_same_device(store, rank, size, chosen)
                device_id = chosen if chosen.type == "cuda" else None
                with group.connections.noted(group.port):
                    dist.init_process_group(
                        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id
                    )
            remark = why_not_gpus(device, chosen, local_size)
            here = socket.gethostname()
            world = with_shared_sums(
                World(rank, local_rank, size, local_size, chosen, here, remark, group, slot, num_slots)
            )
            sums = world.sums
            yield world
        except BaseException:
            if not is_whole_process:
                if sums is not None:
                    sums.close()
                if dist.is_initialized():
                    _leave_in_failure(chosen, size)
            raise
        else:
            if sums is not None:
                sums.close()
            if dist.is_initialized():
                dist.destroy_process_group()
        finally:
            sys.excepthook = excepthook
            torch.set_num_threads(threads_before)


def with_shared_sums(world: World, to_form: timedelta | None = None) -> World:
    """The same with `sums`, where that can be. Every rank must call it, after the group has formed.

    `to_form` is how long the machines may take to meet (None: as long as a collective).
    """
    group = world.group
    if group is None or not 1 < world.size <= group.most_sharing_memory:
        return replace(world, sums=None)
    with group.connections.noted(group.port):
        return replace(world, sums=shared_sums(world.rank, group.timeout, to_form))


def _leave_in_failure(device: torch.device, size: int) -> None:
    """Leave the group for a program that may go on: NCCL's communicators are aborted, for the others may still wait."""
    if device.type == "cuda" and size > 1:
        # Goodbye in order would first let all collectives that are under way end, which some ranks may never join.
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def init_gloo(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Start a process group over gloo alone; `timeout` is that of forming it and of its collectives."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def new_group(world: World, ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The one of these groups of ranks that this rank is in: each is in one. Every rank must call it alike."""
    timeout = world.group.timeout if world.group is not None else None  # torch's own may be longer than the watchdog's
    found, _ = dist.new_subgroups_by_enumeration([list(of_group) for of_group in ranks], timeout=timeout)
    return cast("dist.ProcessGroup", found)


def joins_later() -> bool:
    """Whether this worker comes to a run under way: it is alone until then."""
    return bool(os.environ.get(JOINS))


def store_for_a_thread(timeout_s: float) -> Store | None:
    """A connection of its own to the store that all ranks reach, for another thread; None for a worker that is alone.

    A key that is not there is waited for `timeout_s`.
    """
    connect = way_to_the_store(timeout_s)
    return connect() if connect is not None else None


def way_to_the_store(timeout_s: float) -> Callable[[], Store] | None:
    """What makes a connection as `store_for_a_thread` does, for the thread itself to call.

    It may take long if the process that serves the store has just died.
    """
    if dist.get_world_size() == 1:
        return None
    shared = dist.distributed_c10d._get_default_store()

    def connect() -> Store:
        store: Store = shared.clone()
        store.set_timeout(timedelta(seconds=timeout_s))
        return store

    return connect


def on_device(world: World, name: str) -> World:
    """The same place with the device that `name` asks for, for workers that learn of it only after they have joined.

    The process group is as it was. Every rank must call it. Raises ConfigurationError if the device is not there.
    """
    chosen = choose_device(name, world.local_rank, world.local_size, world.size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    places = [""] * world.size
    dist.all_gather_object(places, f"{chosen.type} on {world.host}")
    refuse_a_mixture(places)
    return replace(world, device=chosen, remark=why_not_gpus(name, chosen, world.local_size))


def _all_have_the_same_device(store: Store, rank: int, size: int, device: torch.device) -> None:
    """Raise ConfigurationError on every rank if not; by the store, as NCCL would wait for ranks that have no GPU."""
    store.set(f"disttrain/device/{rank}", f"{device.type} on {socket.gethostname()}")
    places = [store.get(f"disttrain/device/{other}").decode() for other in range(size)]
    try:
        refuse_a_mixture(places)
    except ConfigurationError:
        store.set(f"disttrain/device/{rank}/read", "")
        if rank == 0:  # the store may end with it
            store.wait([f"disttrain/device/{other}/read" for other in range(size)])
        raise


@contextmanager
def _gloo_on_loopback(*, is_alone: bool) -> Iterator[None]:
    """Where one machine has all workers, have gloo listen where no other can connect. The user's own setting wins."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if not is_alone or loopback is None or _GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[_GLOO_INTERFACE] = loopback
    try:
        yield
    finally:
        os.environ.pop(_GLOO_INTERFACE, None)
