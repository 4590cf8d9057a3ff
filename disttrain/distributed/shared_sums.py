"""Sums over the workers of one machine, in memory that all of them have mapped, in place of gloo's loopback.

Every two workers have a socket between them, too. Whoever has written its numbers sends a few bytes, and waiting is
reading them: a waiting worker takes no time of a core, and a peer that dies is noticed at once, since the system closes
its sockets. A thread of its own reads them, see `_Waiter`.

Numbers are added in the order of the ranks: the bits depend on no timing. They come in pieces, each in the next of
`_NUM_PLACES` places, which are used in turn. A piece is added up by everyone if that is little, else each worker adds
up a part of it, and then reads the others'.
"""

from __future__ import annotations

import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from disttrain.distributed.shared_memory import close_all, share_memory

_PIECE = 1 << 20  # bytes: pieces of two workers fit into the cache that their cores share
_NUM_PLACES = 8
# Nobody has more pieces under way than this. A piece takes the place of the one `_NUM_PLACES` before it, which all have
# read by then: each has begun the one `_MOST_BEGUN` before it, and finished another `_MOST_BEGUN` before that.
_MOST_BEGUN = _NUM_PLACES // 2
_LITTLE = 1 << 15  # bytes that more than two workers rather all add up than meet twice for
_IS_SUMMED = 1 << 31
_MESSAGE = struct.Struct("<I")  # the bytes of a piece, the highest bit set once this worker's part is summed
_MOST_READ = 1 << 12


class SharedSums:
    """The sums of this machine's workers. Every rank must begin and finish the same ones in the same order.

    All calls raise RuntimeError if another worker has gone, has not come in time, or sums something else.
    """

    def __init__(self, rank: int, memory: torch.Tensor, peers: Sequence[socket.socket | None]) -> None:
        """`memory` is (places, ranks, bytes) uint8; `peers` are the sockets by rank, None for this one."""
        self._rank, self._memory, self._size = rank, memory, len(peers)
        self._peers = {other: peer for other, peer in enumerate(peers) if peer is not None}
        self.num_begun = 0
        """How many pieces this rank has begun, finished or not; any thread may ask."""
        self._under_way: deque[_Piece] = deque()
        self._sent = bytearray()  # since `_num_met` messages, as `_heard`
        self._heard = {other: bytearray() for other in self._peers}
        self._num_sent = self._num_met = 0
        self._waiter = _Waiter()
        # A group that was formed anew has no block to end with.
        self._close = weakref.finalize(self, _end, self._waiter, list(peers))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor`, which is contiguous, by its sum over all ranks."""
        self.begin_(tensor)
        self.finish()
        return tensor

    @torch.no_grad()
    def begin_(self, tensor: torch.Tensor, *, divisor: int = 1, sent_as: torch.dtype | None = None) -> None:
        """Begin to replace `tensor`, which is contiguous, by its sum over all ranks; it must not be touched meanwhile.

        Each rank's is divided by `divisor` before, and rounded to `sent_as`, the type in which they are added up.
        """
        dtype = sent_as or tensor.dtype
        for part in torch.split(tensor.view(-1), max(1, _PIECE // max(dtype.itemsize, tensor.element_size()))):
            while len(self._under_way) >= _MOST_BEGUN:
                self._finish_one()
            places = self._memory[self.num_begun % _NUM_PLACES, :, : part.numel() * dtype.itemsize].view(dtype)
            self.num_begun += 1
            if divisor == 1:
                places[self._rank].copy_(part)
            else:
                torch.div(part, divisor, out=places[self._rank])
            self._under_way.append(_Piece(part, places, self._send(places.shape[1] * dtype.itemsize)))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for all sums that have been begun."""
        for piece in self._under_way:
            self._add_up(piece)
        while self._under_way:
            self._finish_one()

    def cut(self) -> None:
        """Have all that is called raise from now on, on the peers as well."""
        for peer in self._peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the sockets back, as the last reference would; the memory follows with the tensors that show it."""
        self._close()

    def _finish_one(self) -> None:
        piece = self._under_way[0]
        self._add_up(piece)
        if piece.summed is not None:
            self._wait_for(piece.summed)
            for rank, part in enumerate(piece.into.tensor_split(self._size)):
                part.copy_(piece.part(rank)[rank])
        self._under_way.popleft()

    def _add_up(self, piece: _Piece) -> None:
        """Add up all of it, or this rank's part, which the others then wait for."""
        if piece.is_added_up:
            return
        self._wait_for(piece.message)
        places, into = piece.places, piece.into
        if self._size == 2 and into.dtype == places.dtype:
            torch.add(places[0], places[1], out=into)
        elif self._size == 2 or places[0].nbytes <= _LITTLE:
            into.copy_(_sum_of(places))
        else:
            mine = piece.part(self._rank)
            mine[self._rank].copy_(_sum_of(mine))
            piece.summed = self._send(places[0].nbytes | _IS_SUMMED)
        piece.is_added_up = True

    def _send(self, content: int) -> int:
        """Send all ranks a message; returns its number."""
        message = _MESSAGE.pack(content)
        for peer in self._peers.values():
            with suppress(OSError):  # a peer that has gone is missed by whoever waits for it, as in gloo
                peer.sendall(message)
        self._sent += message
        self._num_sent += 1
        return self._num_sent - 1

    def _wait_for(self, number: int) -> None:
        """Wait until each rank has sent its message of this number, which is like this rank's own."""
        length = (number + 1 - self._num_met) * _MESSAGE.size
        if length <= 0:
            return
        expected = self._sent[:length]
        for other, peer in self._peers.items():
            heard = self._heard[other]
            while len(heard) < length:
                heard += self._received(other, peer)
            if heard[:length] != expected:
                raise RuntimeError(f"rank {other} does not sum what rank {self._rank} sums: one of them left a sum out")
        for heard in self._heard.values():
            del heard[:length]
        del self._sent[:length]
        self._num_met = number + 1

    def _received(self, other: int, peer: socket.socket) -> bytes:
        """What `other` has sent, or sends next."""
        try:
            received = None
            with suppress(BlockingIOError):
                received = peer.recv(_MOST_READ, socket.MSG_DONTWAIT)
            if received is None:
                self._waiter.wait_for(peer)
                received = peer.recv(_MOST_READ, socket.MSG_DONTWAIT)
        except BlockingIOError as error:  # the socket's own limit of time
            raise RuntimeError(f"Timed out waiting for what rank {other} adds to a sum") from error
        except OSError as error:
            raise _gone(other) from error
        if not received:
            raise _gone(other)
        return received


class _Waiter:
    """Waits until there is something to read, on a thread of its own.

    The system tends to move a thread to the core of the one whose message wakes it. Were that a thread that computes,
    two workers would often share a core while others are less busy: beside three other processes on two cores in 0.6
    of the steps in place of 0.3, and these took a fifth longer than through gloo, whose threads wait likewise (Linux
    6.18).
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._asked, self._answered = threading.Lock(), threading.Lock()
        self._asked.acquire()
        self._answered.acquire()
        threading.Thread(target=self._serve, name="disttrain-shared-sums", daemon=True).start()

    def wait_for(self, peer: socket.socket) -> None:
        """Return when a message or the end of `peer` can be read, or when it has reached its limit of time."""
        self._socket = peer
        self._asked.release()
        self._answered.acquire()

    def end(self) -> None:
        """Have the thread end; nothing can be waited for any more."""
        self._socket = None
        self._asked.release()

    def _serve(self) -> None:
        while True:
            self._asked.acquire()
            if self._socket is None:
                return
            with suppress(OSError):
                self._socket.recv(1, socket.MSG_PEEK)
            self._answered.release()


@dataclass
class _Piece:
    """A piece under way: where its sum belongs, what each rank has written, and the messages that say so."""

    into: torch.Tensor
    places: torch.Tensor
    message: int
    summed: int | None = None
    is_added_up: bool = False

    def part(self, rank: int) -> torch.Tensor:
        """What each rank has written of the part that `rank` adds up."""
        return self.places.tensor_split(len(self.places), dim=1)[rank]


def _sum_of(rows: torch.Tensor) -> torch.Tensor:
    """The rows, (ranks, numbers), added up from the first to the last."""
    total = rows[0].clone()
    for row in rows[1:]:
        total.add_(row)
    return total


def _end(waiter: _Waiter, peers: Sequence[socket.socket | None]) -> None:
    waiter.end()
    close_all(peers)


def _gone(rank: int) -> RuntimeError:
    return RuntimeError(f"Connection closed by peer: rank {rank} has gone, or has left the group")


def shared_sums(rank: int, size: int, timeout_s: float) -> SharedSums | None:
    """Sums of the ranks of the process group, which are all on this machine; None, on all of them, if that cannot be.

    A sum that takes longer than `timeout_s` fails. Every rank must call it.
    """
    shared = share_memory(rank, size, _NUM_PLACES * size * _PIECE, timeout_s)
    if shared is None:
        return None
    memory, peers = shared
    return SharedSums(rank, memory.view(_NUM_PLACES, size, _PIECE), peers)
