"""Sums over the workers of one machine, in memory that all of them have mapped, in place of gloo's loopback.

Every two workers have a socket between them, too. Whoever has written its numbers sends a few bytes, and waiting is
reading them: a waiting worker takes no time of a core, and a peer that dies is noticed at once, since the system closes
its sockets. A thread of its own reads them, see `waiter`.

Numbers are added in the order of the ranks: the bits depend on no timing. They come in pieces, each in the next of
`_NUM_PLACES` places, which are used in turn. A piece is added up by everyone if that is little, else each worker adds
up a part of it, and then reads the others'. Where there are more machines, a machine's first worker adds up all of it,
sums that with the first ones of the others, and everyone reads what comes of it: only these sums leave the machine.
"""

from __future__ import annotations

import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from disttrain.distributed.between_machines import BetweenMachines
from disttrain.distributed.collectives import is_interrupted, wait_for
from disttrain.distributed.integers import add
from disttrain.distributed.shared_memory import SharedMemory, close_all, cut_all, share_memory
from disttrain.distributed.waiter import Waiter

_PIECE = 1 << 20  # bytes: pieces of two workers fit into the cache that their cores share
_NUM_PLACES = 8
# Nobody has more pieces under way than this. A piece takes the place of the one `_NUM_PLACES` before it, which all have
# read by then: each has begun the one `_MOST_BEGUN` before it, and finished another `_MOST_BEGUN` before that.
_MOST_BEGUN = _NUM_PLACES // 2
_LITTLE = 1 << 15  # bytes that more than two workers rather all add up than meet twice for
_IS_SUMMED = 1 << 31
_MESSAGE = struct.Struct("<I")  # the bytes of a piece, the highest bit set once this worker's part is summed
_MOST_READ = 1 << 12

Numbers = Callable[[torch.Tensor], None]


class SharedSums:
    """The sums of all workers. Every rank must begin and finish the same ones in the same order.

    All calls raise RuntimeError if another worker has gone, has not come in time, or sums something else.
    """

    def __init__(self, rank: int, shared: SharedMemory, waiter: Waiter, between: BetweenMachines | None) -> None:
        """`between` is there for the first worker of each machine, where there are more than one."""
        self._rank, self._ranks, self._between = rank, shared.ranks, between
        self._place, self._size = shared.ranks.index(rank), len(shared.ranks)
        self._memory = shared.memory.view(self._size, _NUM_PLACES, _PIECE)
        self._peers = {other: peer for other, peer in enumerate(shared.peers) if peer is not None}
        self.workers = tuple(map(len, shared.machines))
        """How many there are on each machine: with the order of the machines, what the order of additions hangs on."""
        self.num_begun = 0
        """How many pieces this rank has begun, finished or not; any thread may ask."""
        self._under_way: deque[_Piece] = deque()
        self._sum = torch.empty(_PIECE, dtype=torch.uint8)  # of the piece that is taken, see `begin_with`
        self._sent = bytearray()  # since `_num_met` messages, as `_heard`
        self._heard = {other: bytearray() for other in self._peers}
        self._num_sent = self._num_met = 0
        self._waiter = waiter
        # A group that was formed anew has no block to end with.
        self._close = weakref.finalize(self, _end, os.getpid(), waiter, shared.peers)

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
            places = self._next_places(part.numel(), dtype)
            if divisor == 1:
                places[self._place].copy_(part)
            else:
                torch.div(part, divisor, out=places[self._place])
            self._begin(_Piece(part, places, self._send(places[0].nbytes)))

    @torch.no_grad()
    def begin_with(self, size: int, dtype: torch.dtype, fill: Numbers, take: Numbers) -> None:
        """Begin to sum what `fill` writes to the memory that it is given, (size,), a mebibyte at most.

        `take` is given the sum, which is gone once it has returned: in the order in which sums were begun, by `finish`
        or before.
        """
        places = self._next_places(size, dtype)
        fill(places[self._place])
        into = self._sum[: places[0].nbytes].view(dtype)
        self._begin(_Piece(into, places, self._send(places[0].nbytes), take))

    def _next_places(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Where each rank writes so many numbers of the next piece, (ranks, size)."""
        assert size * dtype.itemsize <= _PIECE
        while len(self._under_way) >= _MOST_BEGUN:
            self._finish_one()
        places = self._memory[:, self.num_begun % _NUM_PLACES, : size * dtype.itemsize].view(dtype)
        self.num_begun += 1
        return places

    def _begin(self, piece: _Piece) -> None:
        self._under_way.append(piece)
        if self._between is not None and self._has_come(piece.message):
            self._add_up_all()  # the network works while the next one is computed

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for all sums that have been begun."""
        self._add_up_all()
        while self._under_way:
            self._finish_one()

    def cut(self) -> None:
        """Have all that is called raise from now on, on this machine's other workers as well."""
        cut_all(self._peers.values())

    def close(self) -> None:
        """Give the sockets back, as the last reference would; the memory follows with the tensors that show it."""
        self._close()
        if self._between is not None:
            self._between.close()

    def abandon(self) -> None:
        """As `close`, after another worker was lost."""
        self._close()
        if self._between is not None:
            self._between.abandon()

    def _finish_one(self) -> None:
        piece = self._under_way[0]
        places, into = piece.places, piece.into
        if len(self.workers) > 1:
            self._add_up_all()  # so that more than one is on its way through the network
            if piece.between is not None:
                wait_for(piece.between)
            self._wait_for(self._send(places[0].nbytes | _IS_SUMMED))
            into.copy_(places[0])
        else:
            self._add_up(piece)
            if piece.summed is not None:
                self._wait_for(piece.summed)
                for place, part in enumerate(into.tensor_split(self._size)):
                    part.copy_(piece.part(place)[place])
            elif self._size == 2 and into.dtype == places.dtype:
                add(places[0], places[1], out=into)
            else:
                into.copy_(_sum_of(places))
        if piece.take is not None:
            piece.take(into)
        self._under_way.popleft()

    def _add_up_all(self) -> None:
        for piece in self._under_way:
            self._add_up(piece)

    def _add_up(self, piece: _Piece) -> None:
        """Add up what is to be added up for others: all of it, or this rank's part."""
        if piece.is_added_up:
            return
        self._wait_for(piece.message)
        places = piece.places
        if len(self.workers) > 1:
            if self._between is not None:
                for row in places[1:]:
                    add(places[0], row, out=places[0])
                piece.between = self._between.begin_sum_(places[0])
        elif self._size > 2 and places[0].nbytes > _LITTLE:
            mine = piece.part(self._place)
            mine[self._place].copy_(_sum_of(mine))
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
                raise RuntimeError(
                    f"rank {self._ranks[other]} does not sum what rank {self._rank} sums: one of them left a sum out"
                )
        for heard in self._heard.values():
            del heard[:length]
        del self._sent[:length]
        self._num_met = number + 1

    def _has_come(self, number: int) -> bool:
        """Whether `_wait_for` would return at once."""
        length = (number + 1 - self._num_met) * _MESSAGE.size
        for other, peer in self._peers.items():
            with suppress(OSError):  # nothing is there; or it has gone, as whoever waits for it learns
                if len(self._heard[other]) < length:
                    self._heard[other] += peer.recv(_MOST_READ, socket.MSG_DONTWAIT)
        return all(len(heard) >= length for heard in self._heard.values())

    def _received(self, other: int, peer: socket.socket) -> bytes:
        """What `other` has sent, or sends next."""
        try:
            received = None
            with suppress(BlockingIOError):
                received = peer.recv(_MOST_READ, socket.MSG_DONTWAIT)
            if received is None:
                self._waiter.wait_for(peer, is_interrupted)
                received = peer.recv(_MOST_READ, socket.MSG_DONTWAIT)
        except BlockingIOError as error:  # the socket's own limit of time
            raise RuntimeError(f"Timed out waiting for what rank {self._ranks[other]} adds to a sum") from error
        except OSError as error:
            raise _gone(self._ranks[other]) from error
        if not received:
            raise _gone(self._ranks[other])
        return received


@dataclass
class _Piece:
    """A piece under way: where its sum belongs, what each rank has written, and the messages that say so."""

    into: torch.Tensor
    places: torch.Tensor
    message: int
    take: Numbers | None = None
    summed: int | None = None
    between: dist.Work | None = None
    is_added_up: bool = False

    def part(self, rank: int) -> torch.Tensor:
        """What each rank has written of the part that `rank` adds up."""
        return self.places.tensor_split(len(self.places), dim=1)[rank]


def _sum_of(rows: torch.Tensor) -> torch.Tensor:
    """The rows, (ranks, numbers), added up from the first to the last."""
    total = rows[0].clone()
    for row in rows[1:]:
        add(total, row, out=total)
    return total


def _end(worker: int, waiter: Waiter, peers: list[socket.socket | None]) -> None:
    if os.getpid() == worker:  # a process that it has forked ends, too, and would cut it off
        cut_all(peers)  # a socket that is closed while a thread reads from it would stay open for the other end
        waiter.end()
    close_all(peers)


def _gone(rank: int) -> RuntimeError:
    return RuntimeError(f"Connection closed by peer: rank {rank} has gone, or has left the group")


def shared_sums(rank: int, timeout: timedelta, to_form: timedelta | None = None) -> SharedSums | None:
    """Sums of the ranks of the process group; None, on all of them, if no two are on one machine or one cannot share.

    A sum that takes longer than `timeout` fails; `to_form` is how long the machines may take to meet (None: as long).
    Every rank must call it.
    """
    with ExitStack() as unless_it_fails:
        waiter: Waiter | None = None
        with suppress(RuntimeError):
            waiter = Waiter()
            unless_it_fails.callback(waiter.end)
        shared = share_memory(rank, _NUM_PLACES * _PIECE, timeout.total_seconds(), is_able=waiter is not None)
        if shared is None or waiter is None:
            return None
        unless_it_fails.callback(close_all, shared.peers)  # or whoever waits for this one would wait on
        between = None
        if len(shared.machines) > 1 and rank == shared.ranks[0]:
            between = BetweenMachines(shared.place, len(shared.machines), timeout, to_form or timeout)
        unless_it_fails.pop_all()
        return SharedSums(rank, shared, waiter, between)
