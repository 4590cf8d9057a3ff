"""Memory that all workers of a machine have mapped, and a socket between every two of them.

The memory is a file without a name (memfd): nothing can be left behind in /dev/shm, whose size does not limit it
either. Its pages are reserved at once, so that no write can end in SIGBUS. A machine's first worker makes it and sends
its descriptor.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from disttrain.distributed.collectives import gather_objects

_Offer = tuple[str, bytes, bytes]  # a rank's machine, where it listens, and what it wants to hear
_HELLO = struct.Struct("<I16s")  # rank, and what the listener wants to hear
_PEER = struct.Struct("3i")  # struct ucred: process, user, group
_TIME = struct.Struct("@ll")  # struct timeval
_MOST_S = 10**6  # the system takes no numbers of any size
_BOOT, _NETWORK = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/net"


@dataclass(frozen=True)
class SharedMemory:
    """What the workers of a machine share, as one of them has it.

    Args:
        memory: (workers, bytes) uint8, a row for each of this machine's.
        peers: sockets to this machine's workers, in the order of their ranks; None for this one.
        machines: the ranks of each machine's workers, in the order of their first.
        place: which of the `machines` this is.
    """

    memory: torch.Tensor
    peers: list[socket.socket | None]
    machines: list[list[int]]
    place: int

    @property
    def ranks(self) -> list[int]:
        """Of this machine's workers."""
        return self.machines[self.place]


def share_memory(rank: int, num_bytes: int, timeout_s: float, *, is_able: bool = True) -> SharedMemory | None:
    """Memory of `num_bytes` for each worker; None on all if it fails on any rank, or if no machine has two workers.

    Reading from a socket fails with BlockingIOError after `timeout_s`. The rank is that of the process group; one that
    is not `is_able` has all do without. Every rank must call it.
    """
    if not hasattr(os, "memfd_create"):  # not Linux, so on no rank
        return None
    # Only our collectives are waited for: they notice a rank that dies, and a verdict that one has.
    with ExitStack() as unless_it_fails, ExitStack() as in_any_case:
        secret = secrets.token_bytes(16)
        listener: socket.socket | None = None
        mine: _Offer | None = None
        with suppress(OSError):  # a sandbox without such sockets, or no descriptor is left
            if is_able:
                listener = in_any_case.enter_context(_listener())
                mine = _machine(), listener.getsockname(), secret
        offers: list[_Offer | None] = gather_objects(mine)
        by_machine: dict[str, list[int]] = {}
        for other, offer in enumerate(offers):
            if offer is not None:
                by_machine.setdefault(offer[0], []).append(other)
        if listener is None or mine is None or None in offers or len(by_machine) == len(offers):
            return None
        ranks = by_machine[mine[0]]
        peers: list[socket.socket | None] = [None] * len(ranks)
        unless_it_fails.callback(close_all, peers)
        descriptor: int | None = None
        has_connected = False
        with suppress(OSError):
            if rank == ranks[0]:
                descriptor = _reserved(len(ranks) * num_bytes)
                in_any_case.callback(os.close, descriptor)
            for place, other in enumerate(ranks):
                if other > rank and (offer := offers[other]) is not None:
                    peers[place] = _connected(offer, rank, descriptor)
            has_connected = True
        if not all(gather_objects(has_connected)):
            return None
        memory: torch.Tensor | None = None
        with suppress(OSError, ValueError):
            for _ in range(ranks.index(rank)):  # each has connected by now
                other, connection, received = _accepted(listener, secret)
                peers[ranks.index(other)] = connection
                if received is not None:
                    descriptor = received
                    in_any_case.callback(os.close, received)
            for place, peer in enumerate(peers):
                if peer is None:
                    assert ranks[place] == rank
                    continue
                limit_s = min(timeout_s, _MOST_S)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIME.pack(int(limit_s) + 1, 0))
            if descriptor is not None:
                memory = torch.frombuffer(mmap.mmap(descriptor, len(ranks) * num_bytes), dtype=torch.uint8)
        if not all(gather_objects(memory is not None)) or memory is None:
            return None
        unless_it_fails.pop_all()
        machines = list(by_machine.values())
        return SharedMemory(memory.view(len(ranks), num_bytes), peers, machines, machines.index(ranks))


def _machine() -> str:
    """What is the same for those that can connect to each other by sockets of the system. Raises OSError."""
    return f"{_BOOT.read_text().strip()} {os.stat(_NETWORK).st_ino}"


def cut_all(peers: Iterable[socket.socket | None]) -> None:
    """Have whoever reads from the sockets, on any thread and at the other end, read their end."""
    for peer in peers:
        if peer is not None:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


def close_all(peers: Iterable[socket.socket | None]) -> None:
    """Close the sockets that are there."""
    for peer in peers:
        if peer is not None:
            peer.close()


def _reserved(num_bytes: int) -> int:
    """The descriptor of so much memory. Raises OSError if there is not so much."""
    descriptor = os.memfd_create("disttrain")
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _listener() -> socket.socket:
    """A socket that waits for the others, at an address that is no file. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(f"\0disttrain-{secrets.token_hex(16)}")
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def _connected(offer: _Offer, rank: int, descriptor: int | None) -> socket.socket:
    """A socket to another rank, which learns of this one, and of the `descriptor` if there is one. Raises OSError."""
    _, address, secret = offer
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(None)  # whatever the program around it has set as the default
        peer.connect(address)
        _refuse_strangers(peer)
        socket.send_fds(peer, [_HELLO.pack(rank, secret)], [] if descriptor is None else [descriptor])
    except OSError:
        peer.close()
        raise
    return peer


def _accepted(listener: socket.socket, secret: bytes) -> tuple[int, socket.socket, int | None]:
    """The rank of one that has connected, its socket, and the descriptor it has sent.

    Raises OSError or ValueError if it is none of this job.
    """
    peer, _ = listener.accept()
    try:
        peer.settimeout(None)
        _refuse_strangers(peer)
        content, descriptors, _, _ = socket.recv_fds(peer, _HELLO.size, 1, socket.MSG_DONTWAIT)
        rank, heard = _HELLO.unpack(content) if len(content) == _HELLO.size else (-1, b"")
        if not secrets.compare_digest(heard, secret):
            raise ValueError("it does not know what a worker of this job knows")
    except (OSError, ValueError):
        peer.close()
        raise
    return rank, peer, descriptors[0] if descriptors else None


def _refuse_strangers(peer: socket.socket) -> None:
    """Raise OSError for a process of another user."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    if _PEER.unpack(credentials)[1] != os.getuid():
        raise PermissionError
