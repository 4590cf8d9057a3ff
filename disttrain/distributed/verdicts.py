"""What the launcher tells its workers when one of them is lost or comes: no torch, as the launcher writes it.

Each worker has a pipe of its own, which outlives the other workers and needs no port.
"""

from __future__ import annotations

import json
import os
import select
import time
from dataclasses import asdict, dataclass

from disttrain.files import parse_json
from disttrain.layout import VERDICTS


@dataclass(frozen=True)
class Verdict:
    """Who continues after a loss, or with a newcomer, as one of them gets it.

    Args:
        generation: how many verdicts there have been, this one included.
        rank: the reader's from now on; None: it is not to continue, and neither are the others.
        size: how many workers continue.
        num_new: how many of them are new.
        new_ranks: whose places those take.
        lost: who died of what, in words; empty if none did.
        lost_ranks: the ranks that they were started with.
        time: when the launcher noticed, in seconds since 1970.
        host, port: where they meet; where they met before if these are empty.
        local_rank, local_size: the reader's place among the workers of its machine; None if one machine has all.
    """

    generation: int
    rank: int | None
    size: int = 0
    num_new: int = 0
    lost: str = ""
    lost_ranks: tuple[int, ...] = ()
    new_ranks: tuple[int, ...] = ()
    time: float = 0.0
    port: int = 0
    host: str = ""
    local_rank: int | None = None
    local_size: int = 0

    @classmethod
    def of(cls, line: str | bytes) -> Verdict:
        """The verdict of such a line as `line` writes."""
        fields = parse_json(line)
        return cls(**fields | {name: tuple(fields[name]) for name in ("lost_ranks", "new_ranks")})

    def line(self) -> bytes:
        """As it goes down a worker's pipe: less than what a pipe takes at once."""
        return json.dumps(asdict(self) | {"lost": self.lost[:1000]}).encode() + b"\n"


class Verdicts:
    """A worker's end of its pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read = b""

    @classmethod
    def of_this_process(cls) -> Verdicts | None:
        """The pipe that the launcher left; None if it left none."""
        text = os.environ.get(VERDICTS, "")
        return cls(int(text)) if text.isdecimal() else None

    def wait(self, timeout_s: float | None) -> Verdict | None:
        """The next verdict; None if none comes in time, or the launcher has ended. A timeout of None waits on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._read:
            if not self._take(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
        line, _, self._read = self._read.partition(b"\n")
        return Verdict.of(line)

    def have_come(self) -> bool:
        """Whether there is one that was not waited for yet."""
        return b"\n" in self._read or self._take(0.0)

    def say_that_one_is_lost(self) -> bool:
        """Whether one that was not waited for yet says so: of a machine that is cut off, nothing else tells."""
        self._take(0.0)
        return any(parse_json(line)["lost_ranks"] for line in self._read.split(b"\n")[:-1])

    def _take(self, timeout_s: float | None) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], timeout_s)
        more = os.read(self._descriptor, 4096) if ready else b""
        self._read += more
        return bool(more)
