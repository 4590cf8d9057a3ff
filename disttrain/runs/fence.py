"""Who has lost a run to another process must not write to it again, wherever it stood still in the meantime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from disttrain.distributed.lease import HeldLease
from disttrain.errors import ConfigurationError
from disttrain.files import read_text, replace_file
from disttrain.layout import EPOCH

_ENDS = "This process ends without writing to it."


class Fence:
    """Counts those that have owned a run's folder, and keeps an earlier one from writing there.

    To be made by whoever owns the folder by its lock. The lock alone does not do where a file system takes it from a
    machine that stood still (NFS, after a lease of its server's): that machine wakes up in the middle of what it did.

    Args:
        end: what to do with the process that has lost the run, with the reason; it should not return.
    """

    def __init__(self, folder: Path, end: Callable[[str], object]) -> None:
        """Raises ConfigurationError if the folder cannot be written."""
        self._folder, self._path, self._end = folder, folder / EPOCH, end
        self._lease = HeldLease.of_this_process()
        self._number = self._newest() + 1
        try:
            replace_file(self._path, f"{self._number}\n")
        except OSError as error:
            raise ConfigurationError(
                f"{self._path}: {error.strerror or error}; a run cannot be owned there."
            ) from error

    def check(self) -> None:
        """To be called right before each write: `end` is called if this process may not write any more."""
        if self._lease is not None and self._lease.left_s <= 0:
            self._end(f"{self._folder}: this machine has not heard from the leading one for too long. {_ENDS}")
        elif self._newest() > self._number:
            self._end(f"{self._folder}: another worker has taken the run, as this one stood still. {_ENDS}")

    def _newest(self) -> int:
        """The number of who has taken it last; 0 if there is none: the folder may have been moved or cleaned up."""
        try:
            return int(read_text(self._path))
        except (OSError, ValueError):
            return 0
