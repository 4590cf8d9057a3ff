"""What waits for a socket in place of a thread that computes."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

_LOOK_EVERY_S = 0.25


class Waiter:
    """Waits until there is something to read, on a thread of its own.

    The system tends to move a thread to the core of the one whose message wakes it. Were that a thread that computes,
    two workers would often share a core while others are less busy: beside three other processes on two cores in 0.6
    of the steps in place of 0.3, and these took a fifth longer than through gloo, whose threads wait likewise (Linux
    6.18).
    """

    def __init__(self) -> None:
        """Raises RuntimeError if the system has no thread left."""
        self._asked: queue.SimpleQueue[tuple[socket.socket, threading.Lock] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._asked,), name="disttrain-shared-sums", daemon=True)
        self._thread.start()

    def wait_for(self, peer: socket.socket, gives_up: Callable[[], bool]) -> None:
        """Return when a message or the end of `peer` can be read, when it has reached its limit of time, or given up.

        Of a peer that has died the end cannot be read as long as a process that it had forked lives: it holds the
        socket, too.
        """
        # A lock of its own: an exception that a signal's handler raises here must not leave the next call an answer.
        answered = threading.Lock()
        answered.acquire()
        self._asked.put((peer, answered))
        while not answered.acquire(timeout=_LOOK_EVERY_S) and not gives_up():
            pass

    def end(self) -> None:
        """Have the thread end, which no socket may hold up any more; nothing can be waited for from now on."""
        self._asked.put(None)
        if threading.current_thread() is not self._thread:  # the garbage of any thread may be collected on it
            self._thread.join()


def _serve(asked: queue.SimpleQueue[tuple[socket.socket, threading.Lock] | None]) -> None:
    while (one := asked.get()) is not None:
        peer, answered = one
        with suppress(OSError):
            peer.recv(1, socket.MSG_PEEK)
        answered.release()
        del one, peer, answered
