"""Memory that all workers of a machine have mapped, and a socket between every two of them.

The memory is a file without a name (memfd): nothing can be left behind in /dev/shm, whose size does not limit it
either. Its pages are reserved at once, so that no write can end in SIGBUS. Rank 0 makes it and sends its descriptor.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack, suppress

import torch

from disttrain.distributed.collectives import gather_objects

_Offer = tuple[bytes, bytes]  # where a rank listens, and what it wants to hear
_HELLO = struct.Struct("<I16s")  # rank, and what the listener wants to hear
_PEER = struct.Struct("3i")  # struct ucred: process, user, group
_TIME = struct.Struct("@ll")  # struct timeval
_MOST_S = 10**6  # the system takes no numbers of any size


def share_memory(
    rank: int, size: int, num_bytes: int, timeout_s: float
) -> tuple[torch.Tensor, list[socket.socket | None]] | None:
    """The memory, (num_bytes,) uint8, and the sockets by rank, None for this one; None if it fails on any rank.

    Reading from a socket fails with BlockingIOError after `timeout_s`. The ranks are those of the process group, all on
    one machine. Every rank must call it.
    """
    if not hasattr(os, "memfd_create"):  # not Linux, so on no rank
        return None
    # Only our collectives are waited for: they notice a rank that dies, and a verdict that one has.
    with ExitStack() as unless_it_fails, ExitStack() as in_any_case:
        listener = _listener(size)
        if listener is not None:
            in_any_case.enter_context(listener)
        secret = secrets.token_bytes(16)
        offers: list[_Offer | None] = gather_objects((listener.getsockname(), secret) if listener is not None else None)
        if listener is None or not all(offers):
            return None
        peers: list[socket.socket | None] = [None] * size
        unless_it_fails.callback(close_all, peers)
        descriptor: int | None = None
        has_connected = False
        with suppress(OSError):
            if rank == 0:
                descriptor = _reserved(num_bytes)
                in_any_case.callback(os.close, descriptor)
            for other in range(rank + 1, size):
                if (offer := offers[other]) is not None:
                    peers[other] = _connected(offer, rank, descriptor)
            has_connected = True
        if not all(gather_objects(has_connected)):
            return None
        memory: torch.Tensor | None = None
        with suppress(OSError, ValueError):
            for _ in range(rank):  # each has connected by now
                other, connection, received = _accepted(listener, secret)
                peers[other] = connection
                if received is not None:
                    descriptor = received
                    in_any_case.callback(os.close, received)
            for other, peer in enumerate(peers):
                if peer is None:
                    assert other == rank
                    continue
                limit_s = min(timeout_s, _MOST_S)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIME.pack(int(limit_s) + 1, 0))
            if descriptor is not None:
                memory = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        if not all(gather_objects(memory is not None)) or memory is None:
            return None
        unless_it_fails.pop_all()
        return memory, peers


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


def _listener(size: int) -> socket.socket | None:
    """A socket that waits for the others, at an address that is no file; None if that cannot be."""
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:  # a sandbox without such sockets, or no descriptor is left
        return None
    try:
        listener.setblocking(False)
        listener.bind(f"\0disttrain-{secrets.token_hex(16)}")
        listener.listen(size)
    except OSError:
        listener.close()
        return None
    return listener


def _connected(offer: _Offer, rank: int, descriptor: int | None) -> socket.socket:
    """A socket to another rank, which learns of this one, and of the `descriptor` if there is one. Raises OSError."""
    address, secret = offer
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
