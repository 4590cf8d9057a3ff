"""One process at a time writes to a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from disttrain.errors import ConfigurationError
from disttrain.files import open_safely, read_text
from disttrain.layout import LOCK

PATIENCE_S = 10.0
"""How long the workers of a job that was killed a moment ago may take to exit."""
_TO_END_S = 3.0  # after this it is news that one has not
_ACROSS_MACHINES_S = 120.0  # an NFS server frees the locks of a machine that is lost after a lease of, mostly, 90 s


def patience_across_machines_s(others_wait_s: float) -> float:
    """How long to wait on several machines, where others wait for this one, for so long at most."""
    return max(PATIENCE_S, min(_ACROSS_MACHINES_S, others_wait_s / 2))


@contextmanager
def owned(
    folder: Path, patience_s: float = PATIENCE_S, say: Callable[[str], object] = lambda words: None
) -> Iterator[None]:
    """Own `folder` while the block runs. The system gives it back when the process ends, however it ends.

    `say` gets a line if that takes longer than it takes a process to end.

    A POSIX record lock (fcntl(2), F_SETLK): other than flock's, it is not inherited by forked data workers, which may
    outlive the owner. Raises ConfigurationError, which names the owner, if it is not free within `patience_s`; OSError
    if the folder cannot be written or its file system supports no locks.
    """
    path = folder / LOCK
    began, has_said = time.monotonic(), False
    deadline = began + patience_s
    while True:
        with os.fdopen(open_safely(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+") as file:
            if _locked(file.fileno()) and _is_still(path, file.fileno()):
                file.truncate(0)
                file.write(this_owner())
                file.flush()
                os.fsync(file.fileno())  # over NFS other machines would not see it while the file is open
                try:
                    yield
                finally:
                    if _is_still(path, file.fileno()):  # not if the folder was moved, and another is there
                        path.unlink(missing_ok=True)  # while it is ours: another owner's cannot be removed
                return
            file.seek(0)
            in_use = f"{folder} is in use: {file.read().strip() or 'another process'} is training there"
            if time.monotonic() >= deadline:
                raise ConfigurationError(f"{in_use}. Wait until it has ended, stop it, or choose another --run-dir.")
            if not has_said and min(time.monotonic(), deadline) - began > _TO_END_S:
                has_said = True
                say(f"{in_use}; waiting for its end, {deadline - time.monotonic():.0f} s at most")
        time.sleep(0.1)


def this_owner() -> str:
    """What `owner_of` says elsewhere of a folder that this process owns."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def owner_of(folder: Path) -> str:
    """Who owns the folder, or owned it last, in words; empty if that cannot be seen from here.

    Not for the owner: a POSIX lock ends when its process closes any descriptor of the file. It has `this_owner`.
    """
    try:
        return read_text(folder / LOCK)
    except (OSError, ValueError):
        return ""


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as POSIX has it
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has the name now: its owner removes it in the end."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
