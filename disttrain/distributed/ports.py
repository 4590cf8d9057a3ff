"""A TCP port for the workers to meet at."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port that the kernel gives to no other process while the block runs.

    Rank 0 needs seconds before it listens; closing the socket at once would leave the port to any process that asks
    next. On Linux a socket that is bound with SO_REUSEADDR and does not listen keeps the port, and lets rank 0, which
    sets the same option, listen on it. Elsewhere the option does not allow that, so the port is only found, not kept.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port
