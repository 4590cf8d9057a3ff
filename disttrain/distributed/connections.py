"""The connections of a process group, and how to cut them.

`ProcessGroup.abort` does nothing for gloo (torch 2.14): its sockets stay open until the last reference to the group has
gone, and the traceback of the error that a lost worker caused holds one. Until then, whichever rank waits for this one
waits on. A socket that is shut down fails every collective on it at once, here and at the peer, whatever thread is in
it; closing it remains gloo's affair, so no descriptor can be mistaken for a newer one.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_Identity = tuple[int, int]  # of an open socket: device and inode


class Connections:
    """The sockets that a process group has made."""

    def __init__(self) -> None:
        self._sockets: dict[int, _Identity] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._sockets)

    def cut(self) -> None:
        """Shut them down. Collectives of the group raise RuntimeError from now on, on the peers as well."""
        for descriptor, identity in self._sockets.items():
            with suppress(OSError), _borrowed(descriptor, identity) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        self._sockets = {}

    def are_broken(self) -> bool:
        """Whether one of them has been cut, here or by the peer, or its peer has ended."""
        for descriptor, identity in self._sockets.items():
            try:
                with _borrowed(descriptor, identity) as connection:
                    if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        return True
            except BlockingIOError:  # nothing to read: as it should be
                continue
            except OSError:  # gloo has closed it
                return True
        return False

    @contextmanager
    def noted(self, store_port: int) -> Iterator[None]:
        """Take in what the block connects, but for connections to the store, which outlives the group."""
        before = _open_sockets()
        yield
        for descriptor, identity in _open_sockets().items():
            if before.get(descriptor) == identity:
                continue
            with suppress(OSError), _borrowed(descriptor, identity) as connection:
                if not _is_connected(connection):
                    continue
                if store_port not in (connection.getsockname()[1], connection.getpeername()[1]):
                    self._sockets[descriptor] = identity


def _open_sockets() -> dict[int, _Identity]:
    """The sockets of this process; none where the system does not tell (a chroot without /dev/fd)."""
    found: dict[int, _Identity] = {}
    try:
        names = os.listdir("/dev/fd")
    except OSError:
        return found
    for name in names:
        with suppress(OSError):  # the descriptor of this very listing
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = (status.st_dev, status.st_ino)
    return found


@contextmanager
def _borrowed(descriptor: int, identity: _Identity) -> Iterator[socket.socket]:
    """The socket by a descriptor of its own. Raises OSError if another file has taken its number."""
    duplicate = os.dup(descriptor)
    is_blocking = os.get_blocking(duplicate)
    with socket.socket(fileno=duplicate) as connection:
        if connection.gettimeout() is not None:
            # The program has called `socket.setdefaulttimeout`, and Python has changed this for whoever has the socket.
            connection.settimeout(0.0)
            os.set_blocking(duplicate, is_blocking)
        status = os.fstat(connection.fileno())
        if (status.st_dev, status.st_ino) != identity:
            raise OSError
        yield connection


def _is_connected(connection: socket.socket) -> bool:
    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
    return is_internet and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
