"""What two machines of a run say to each other: lines of JSON, and a sign of life each second, which is answered."""

from __future__ import annotations

import json
import select
import socket
import time
from contextlib import suppress
from typing import Any

from disttrain.distributed.lease import now
from disttrain.errors import DisttrainError
from disttrain.files import parse_json
from disttrain_launch.nodes.node import own_addresses, resolve

BEAT_EVERY_S = 1.0
LEASE_S = 10.0
"""For so long after a machine sent a sign of life that the leading machine has answered, its workers may run."""
GONE_AFTER_S = 15.0
"""After so long without one, a machine is lost: its workers have been ended by then, for their lease is shorter."""
TO_A_STORE = b"\x00\xce\xf7\x85\x3c"
"""With what torch.distributed's TCPStore has a client begin: VALIDATE, and its magic number 0x3C85F7CE."""
_PING, _NONCE = b"\x0d", b"dt?!"
_TO_SEND_S = 2.0
_MOST_BYTES = 1 << 20  # of a line


class Gone(Exception):
    """The other machine has closed the connection, or cannot be reached."""


class Wire:
    """One end of the connection between two machines."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_TO_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._read = connection, b""
        self.peer = str(connection.getpeername()[0])
        self._beaten_at, self.heard_at = 0.0, time.monotonic()
        self.is_open = True
        self.is_of_torchrun = False
        """Whether the other end speaks to a store of torch.distributed."""

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send a message, if the other end is there: if not, the next one who reads finds out."""
        if not self.is_open:
            return
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.close()

    def beat(self) -> None:
        """Give a sign of life, if it is time: the answer repeats the moment at which it was sent."""
        if time.monotonic() - self._beaten_at >= BEAT_EVERY_S:
            self._beaten_at = time.monotonic()
            self.send(beat=now())

    def received(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises Gone."""
        while self.is_open and select.select([self], [], [], 0.0)[0]:
            try:
                more = self._connection.recv(65536)
            except OSError:
                more = b""
            if not more or len(self._read) > _MOST_BYTES:
                self.close()
                break
            self.heard_at, self._read = time.monotonic(), self._read + more
            if self._read.startswith(TO_A_STORE):
                self.is_of_torchrun = _NONCE not in self._read  # else another machine asks, see `is_store_at`
                self.close()
                raise Gone
        *lines, self._read = self._read.split(b"\n")
        if not lines and not self.is_open:
            raise Gone
        try:
            messages = [parse_json(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):  # it is none of ours
            self.close()
            raise Gone
        return [message for message in messages if message]

    def close(self) -> None:
        """Close this end."""
        self.is_open = False
        self._connection.close()


def is_store_at(host: str, port: int, timeout_s: float = 5.0) -> bool:
    """Whether a store of torch.distributed answers there, as a torchrun agent's does."""
    with suppress(OSError), socket.create_connection((host, port), timeout_s) as probe:
        probe.sendall(TO_A_STORE + _PING + _NONCE)
        return probe.recv(len(_NONCE)) == _NONCE
    return False


def listener_at(host: str, port: int) -> socket.socket:
    """What listens where the machines meet: at that address alone, if it is this machine's own.

    Raises DisttrainError.
    """
    own = own_addresses()
    addresses = [address for address in resolve(host) if address in own]
    family = socket.AF_INET6 if addresses and ":" in addresses[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((addresses[0] if addresses else "", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise DisttrainError(
            f"--rendezvous {host}:{port}: {error.strerror or error}, so the machines cannot meet there. Wait "
            "for the job that has the port, or choose another."
        ) from error
    return listener
