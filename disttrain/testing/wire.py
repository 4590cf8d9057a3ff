"""Messages between test process, fork server and workers: pickles over a Unix socket, with file descriptors."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

_HEADER = struct.Struct(">IB")
_MOST_FDS = 16


class Channel:
    """One end of a socket pair. Messages are trusted: both ends are this user's own processes."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends; neither survives an exec."""
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """The end that another process passed on as a file descriptor."""
        return cls(socket.socket(fileno=fd))

    def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises BrokenPipeError when the other end is gone."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        header = _HEADER.pack(len(payload), len(fds))
        if fds:
            socket.send_fds(self._socket, [header], list(fds))
            self._socket.sendall(payload)
        else:
            self._socket.sendall(header + payload)

    def receive(self) -> tuple[Any, list[int]]:
        """The next message and its file descriptors. Raises EOFError when the other end is gone."""
        try:
            return self._receive()
        except ConnectionResetError as error:  # it went without having read what we had sent
            raise EOFError from error

    def _receive(self) -> tuple[Any, list[int]]:
        header, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, _MOST_FDS)
        if not header:
            raise EOFError
        header += self._exactly(_HEADER.size - len(header))
        length, num_fds = _HEADER.unpack(header)
        assert num_fds == len(fds)
        return pickle.loads(self._exactly(length)), fds

    def _exactly(self, length: int) -> bytes:
        chunks = []
        while length > 0:
            chunk = self._socket.recv(min(length, 1 << 20))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            length -= len(chunk)
        return b"".join(chunks)

    def fileno(self) -> int:
        """The file descriptor, for select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up. Closing twice does no harm."""
        self._socket.close()
