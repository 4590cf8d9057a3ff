"""A proxy before a TCP or HTTP server, which delays, cuts, refuses, swallows, or answers 500 upon command."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

_CHUNK = 1 << 16
_POLL_S = 0.05


class Proxy:
    """Passes everything on until ordered otherwise; an order holds for open and for new connections.

    `connections` counts those accepted, `errors_answered` the requests it answered itself.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listening: socket.socket | None = None
        self._port = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._mode = "pass"
        self._delay_s = 0.0
        self._status = 500
        self._closing = threading.Event()
        self.connections = 0
        self.errors_answered = 0
        self._listen()
        self._thread = threading.Thread(target=self._accept, name="disttrain-proxy", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 it listens on; the same for as long as it lives."""
        return self._port

    @property
    def url(self) -> str:
        """http://127.0.0.1:port"""
        return f"http://127.0.0.1:{self._port}"

    def forward(self) -> None:
        """Pass everything on again, at once."""
        self._change("pass")

    def delay(self, seconds: float) -> None:
        """Pass everything on, each piece that much later, in both directions."""
        self._change("pass", delay_s=seconds)

    def answer(self, status: int) -> None:
        """Answer every HTTP request with this status; the server never sees it."""
        self._status = status
        self._change("answer")

    def swallow(self) -> None:
        """Accept connections and what they send, and never answer: a black hole."""
        self._change("swallow")

    def refuse(self) -> None:
        """Stop listening and cut what is open: connections are refused, as by a server that is down."""
        self._change("refuse")
        with self._lock:
            listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # at once, though another thread still waits in select
            listening.close()
        self.cut()

    def cut(self) -> None:
        """Reset every open connection, in the middle of whatever it is doing. New ones are served."""
        with self._lock:
            open_now, self._open = self._open, set()
        for end in open_now:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Stop, and cut what is open."""
        self._closing.set()
        self.refuse()
        self._thread.join(5)

    def _change(self, mode: str, delay_s: float = 0.0) -> None:
        self._mode, self._delay_s = mode, delay_s
        if mode != "refuse" and self._listening is None and not self._closing.is_set():
            self._listen()

    def _listen(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self._port))
        listening.listen(128)
        self._port = int(listening.getsockname()[1])
        with self._lock:
            self._listening = listening

    def _accept(self) -> None:
        while not self._closing.is_set():
            listening = self._listening
            try:
                if listening is None:
                    time.sleep(_POLL_S)
                    continue
                ready, _, _ = select.select([listening], [], [], _POLL_S)
                client = listening.accept()[0] if ready else None
            except (OSError, ValueError):  # closed meanwhile
                continue
            if client is not None:
                self.connections += 1
                with self._lock:
                    self._open.add(client)
                threading.Thread(target=self._serve, args=(client,), name="disttrain-proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        try:
            while True:
                ends = [client] if server is None else [client, server]
                ready, _, _ = select.select(ends, [], [], _POLL_S)
                if self._closing.is_set() or client.fileno() < 0:
                    return
                for end in ready:
                    data = end.recv(_CHUNK)
                    if end is client and self._mode == "answer" and data:
                        self._answer_error(client)
                        return
                    if self._mode == "swallow" and data:
                        continue
                    if not data:
                        return
                    if server is None:
                        server = socket.create_connection(self._target, timeout=10)
                        with self._lock:
                            self._open.add(server)
                    if self._delay_s:
                        time.sleep(self._delay_s)
                    (server if end is client else client).sendall(data)
        except (OSError, ValueError):  # cut, or the server is down
            return
        finally:
            with self._lock:
                self._open -= {client} if server is None else {client, server}
            client.close()
            if server is not None:
                server.close()

    def _answer_error(self, client: socket.socket) -> None:
        self.errors_answered += 1
        body = b'{"error": "answered by disttrain.testing.proxy"}'
        client.sendall(
            f"HTTP/1.1 {self._status} Injected\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
            + body
        )
        # Take in the rest of the request: closing on unread bytes would reset the answer away.
        client.shutdown(socket.SHUT_WR)
        client.settimeout(0.2)
        with contextlib.suppress(OSError):
            while client.recv(_CHUNK):
                pass


@contextlib.contextmanager
def proxy(target: str | int) -> Iterator[Proxy]:
    """A proxy on loopback before `target`: a URL (`http://127.0.0.1:5000`), `host:port`, or a port of 127.0.0.1."""
    text = f"127.0.0.1:{target}" if isinstance(target, int) else target
    address = urlsplit(text if "//" in text else f"//{text}")
    if address.hostname is None:
        raise ValueError(f"a proxy needs a target such as http://127.0.0.1:5000 or 127.0.0.1:5000, not {target!r}")
    made = Proxy(address.hostname, address.port or 80)
    try:
        yield made
    finally:
        made.close()
