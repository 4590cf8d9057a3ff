"""What two machines of a run say to each other: lines of JSON, and a sign of life each second."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

from disttrain.files import parse_json

BEAT_EVERY_S = 1.0
LEASE_S = 10.0
"""For so long after the last sign of life from the leading machine, the workers of another may run."""
GONE_AFTER_S = 15.0
"""After so long without one, a machine is lost: its workers have been ended by then, for their lease is shorter."""
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
        self._beaten_at = self.heard_at = time.monotonic()
        self.is_open = True

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
        """Give a sign of life, if it is time."""
        if time.monotonic() - self._beaten_at >= BEAT_EVERY_S:
            self._beaten_at = time.monotonic()
            self.send()

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
