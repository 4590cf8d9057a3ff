"""TCP ports at which nothing answers, in the two ways that exist."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """A port of loopback that refuses connections, as a server that is down: held, so that no server starts there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening
        yield int(held.getsockname()[1])


@contextlib.contextmanager
def blackhole_port() -> Iterator[int]:
    """A port of loopback that never answers, as a server behind a firewall that drops: a connection attempt hangs.

    A listener whose queue is full: Linux drops further attempts silently. (Other systems may refuse them.)
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = int(listening.getsockname()[1])
        for _ in range(16):  # fill the queue: its length is the system's business
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0.2)
            try:
                waiting.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        yield port
