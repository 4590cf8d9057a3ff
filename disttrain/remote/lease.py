"""One job at a time writes to a URL, as far as object stores allow.

They have no lock that dies with its owner, and fsspec offers no compare-and-swap. So the owner writes an object every
few seconds, and a job that wants it watches whether it changes: no clock of one machine is compared with another's.

What that guarantees: a job that beats is not taken for a dead one; a dead one is waited for `EXPIRY_S` at most; one
that stood still for longer and lost the lease finds out before its next upload, and stops writing. What it cannot
guarantee: two that begin in the same second may both believe that it is theirs. The later one keeps it, and the other
finds out the same way; a checkpoint that it was bringing just then is whole, and of the same recipe or refused.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from disttrain.errors import ConfigurationError
from disttrain.remote.place import RemoteRun, as_json

LEASE = "lease.json"
BEAT_S, EXPIRY_S = 10.0, 45.0


class Lease:
    """The right to write to a URL. `id` is this start's own, and `previous` that of its last holder."""

    def __init__(self, run: RemoteRun, *, beat_s: float = BEAT_S, expiry_s: float = EXPIRY_S) -> None:
        self.id = uuid.uuid4().hex
        self.previous = ""
        self._run = run
        self._beat_s, self._expiry_s = beat_s, expiry_s
        self._count = 0
        self._lost = threading.Event()
        self._ends = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._beat_until_the_end, name="lease", daemon=True)

    def acquire(self, dead: str) -> None:
        """Become the owner. `dead` is the id of an owner that is known to have died, or empty.

        Raises ConfigurationError that names a live owner, OSError if the URL cannot be reached.
        """
        there = self._read()
        if there.get("id") not in (None, dead) and not there.get("released"):
            self._wait_until_dead(there)
        self.previous = str(there.get("id", ""))
        self._write()
        self._thread.start()

    def _wait_until_dead(self, there: dict[str, Any]) -> None:
        deadline = time.monotonic() + self._expiry_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._expiry_s / 10))
            now = self._read()
            if now.get("released"):
                return
            if now != there:
                owner = now.get("owner") or there.get("owner", "another process")  # either may be half written
                raise ConfigurationError(
                    f"{self._run.url} is in use: {owner} is training there. Wait until "
                    "it has ended, stop it, or choose another --run-dir."
                )

    def is_ours(self) -> bool:
        """Whether no other job has taken it; looks at the URL. Raises OSError."""
        with self._one_at_a_time:
            if not self._lost.is_set() and self._read().get("id") != self.id:
                self._lost.set()
            return not self._lost.is_set()

    def release(self) -> None:
        """Give it back. Raises OSError; then others have to wait until it expires."""
        self._ends.set()
        self._thread.join()
        if self.is_ours():
            self._write(released=True)

    def _read(self) -> dict[str, Any]:
        content = self._run.read(LEASE)
        # A file, other than an object, may be seen half written: then it is being written.
        return (as_json(content) or {"id": "unknown"}) if content is not None else {}

    def _write(self, released: bool = False) -> None:
        with self._one_at_a_time:
            self._count += 1
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            content = {"id": self.id, "owner": owner, "beat": self._count, "released": released}
            self._run.write(LEASE, json.dumps(content).encode())

    def _beat_until_the_end(self) -> None:
        while not self._ends.wait(self._beat_s):
            try:
                if not self.is_ours():
                    return
                self._write()
            except OSError:
                continue  # the uploads report what is wrong; the next heartbeat may succeed
