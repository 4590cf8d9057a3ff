"""A small disk of its own under a path: really full, really read-only, for programs in any language."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from disttrain.testing.errors import HarnessError


def why_not() -> str | None:
    """Why small disks are not available here; None if they are."""
    if sys.platform != "linux":
        return "a small disk is a tmpfs, which only Linux has"
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    return None


class SmallDisk:
    """A mounted tmpfs. Made by `small_disk`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / ".filler"

    def fill(self, leave: int = 0) -> None:
        """Use up the space but for `leave` bytes (rounded to pages): writing more fails with ENOSPC."""
        filler = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with contextlib.suppress(OSError):
                while True:
                    os.write(filler, b"\0" * 4096)
        finally:
            os.close(filler)
        if leave:
            os.truncate(self._filler, max(0, self._filler.stat().st_size - leave))

    def free(self) -> None:
        """Give the space back that `fill` took."""
        self._filler.unlink(missing_ok=True)

    def read_only(self) -> None:
        """Writing fails with EROFS. Raises HarnessError while a file on the disk is open for writing."""
        _mount("-o", "remount,ro", str(self.path))

    def writable(self) -> None:
        """Undo `read_only`."""
        _mount("-o", "remount,rw", str(self.path))


@contextlib.contextmanager
def small_disk(path: str | os.PathLike[str], size: int) -> Iterator[SmallDisk]:
    """Mount a disk of `size` bytes at `path` (made if missing) for the block, and drop what was written to it.

    Raises:
        HarnessError: not on Linux, or not root. `disttrain.testing.disk.why_not()` checks beforehand, to skip a test.
    """
    reason = why_not()
    if reason is not None:
        raise HarnessError(reason)
    place = Path(path)
    place.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "disttrain-small-disk", str(place))
    try:
        yield SmallDisk(place)
    finally:
        # Lazily: a process that still stands in there must not keep the test from ending.
        subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HarnessError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
