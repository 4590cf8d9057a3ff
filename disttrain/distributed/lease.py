"""Until when the workers of a machine may run, where another machine leads: what the two ends of the lease share.

The leading machine may give their places away once it has heard nothing from them for longer than the lease. So it is
counted from when a sign of life was *sent* that the leading machine has answered, never from when an answer was read:
one that was long on its way, or waited for a process that stood still, extends nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryFile
from typing import IO

from disttrain.layout import LEASE

_MOST_S = 1.0  # how long a worker sleeps before it looks at its lease again
_FORMAT = "d"


def now() -> float:
    """Seconds by a clock that nobody sets, and that also runs while the machine sleeps, where the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Lease:
    """The launcher's end: memory that its workers see, in which the moment stands at which they have to end."""

    def __init__(self) -> None:
        self._file = _memory_file()
        self._file.truncate(mmap.PAGESIZE)
        self._memory = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)

    def fileno(self) -> int:
        """For the workers, as `LEASE` names it."""
        return self._file.fileno()

    def extend(self, until: float) -> None:
        """Let them run until then, by `now`; an earlier moment than before changes nothing."""
        if until > self.until:
            struct.pack_into(_FORMAT, self._memory, 0, until)

    @property
    def until(self) -> float:
        """When it ends, by `now`."""
        return float(struct.unpack_from(_FORMAT, self._memory)[0])

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return now() > self.until

    def close(self) -> None:
        """Let go of it."""
        self._memory.close()
        self._file.close()


class HeldLease:
    """A worker's end."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ)

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> HeldLease | None:
        """The lease that the launcher holds for this worker; None if it may run as long as it likes."""
        text = environment.get(LEASE, "")
        return cls(int(text)) if text.isdecimal() else None

    @property
    def left_s(self) -> float:
        """How long this worker may still run, as far as is known now."""
        return float(struct.unpack_from(_FORMAT, self._memory)[0]) - now()

    def watch(self, end: Callable[[], object]) -> None:
        """Call `end` once it is over, on a thread: its launcher may stand still, and could not end this worker."""

        def wait() -> None:
            while (left_s := self.left_s) > 0:
                time.sleep(min(left_s, _MOST_S))
            end()

        threading.Thread(target=wait, name="lease-watch", daemon=True).start()


def _memory_file() -> IO[bytes]:
    try:
        return os.fdopen(os.memfd_create("disttrain-lease"), "w+b")
    except (AttributeError, OSError):  # another system, or a sandbox that forbids it
        return TemporaryFile()
