"""What a run needs of its file system, tried where runs are to live; everything made there is removed again."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from disttrain.doctor.finding import Finding, failure, ok, warning
from disttrain.doctor.isolated import CrashedError, Isolated
from disttrain.errors import ConfigurationError
from disttrain.files import fsync
from disttrain.runs.lock import owned

_PREFIX = ".doctor-"
_LEFT_BEHIND_S = 3600.0
_MIB = 1024**2
_NO_SPACE, _LITTLE_SPACE = 64 * _MIB, 2048 * _MIB
_SKEW_S = 5.0
_LOCK_ANSWER_S = 20.0


def run_directory(folder: Path) -> Iterator[Finding]:
    """Writing, fsync, rename and locks in `folder` (made for now if it is not there), its clock, its space."""
    try:
        with _probe(folder) as probe:
            seconds, skew = _write_durably(probe)
            yield ok("run-directory", f"{folder}: wrote, fsynced and renamed in {seconds * 1000:.0f} ms")
            yield _locks(folder, probe)
            yield _clock(folder, skew)
            yield _space(folder, probe)
    except OSError as error:
        yield failure(
            "run-directory",
            f"{folder} cannot be used: {error.strerror or error}",
            "Free some space, fix its permissions, or choose another --run-dir.",
        )


@contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`; both are as before when the block ends."""
    made = []
    for missing in reversed([folder, *folder.parents]):
        if not missing.exists():
            missing.mkdir()
            made.append(missing)
    try:
        _remove_what_was_left_behind(folder)
        probe = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        try:
            yield probe
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    finally:
        for one in reversed(made):
            with suppress(OSError):  # something else was put there meanwhile
                one.rmdir()


def _remove_what_was_left_behind(folder: Path) -> None:
    """Left by a check that was killed, long ago, together with every process that could have removed it."""
    for old in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _LEFT_BEHIND_S:
                shutil.rmtree(old, ignore_errors=True)


def _write_durably(probe: Path) -> tuple[float, float]:
    """Write a folder as a checkpoint is written. Returns the seconds it took, and how far the file's clock is ahead."""
    began, earliest = time.monotonic(), time.time()
    writing, named = probe / "writing", probe / "named"
    writing.mkdir()
    content = os.urandom(_MIB)
    with (writing / "file").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    changed = (writing / "file").stat().st_mtime
    latest = time.time()
    fsync(writing)
    writing.rename(named)
    fsync(probe)
    replacement = named / "replacement"
    replacement.write_bytes(content[::-1])
    os.replace(replacement, named / "file")
    if (named / "file").read_bytes() != content[::-1]:
        raise OSError("a file that was replaced reads as it was before")
    skew = changed - latest if changed > latest else min(0.0, changed - earliest)
    return time.monotonic() - began, skew


def _locks(folder: Path, probe: Path) -> Finding:
    """Whether a lock keeps another process out, and lets it in afterwards."""
    remedy = "Mount it with locks (NFS: without nolock, with its lock service running), or choose another --run-dir."
    try:
        with owned(probe, patience_s=0):
            kept_out = not _other_process_owns(probe)
        let_in = _other_process_owns(probe)
    except (OSError, CrashedError, TimeoutError) as error:
        return failure("locks", f"{folder}: no locks: {error}", remedy)
    if not kept_out:
        return failure("locks", f"{folder}: two processes got the same lock", remedy)
    if not let_in:
        return failure("locks", f"{folder}: a lock that was released is still held", remedy)
    return ok("locks", f"{folder}: a lock kept another process out")


def _other_process_owns(probe: Path) -> bool:
    other = Isolated(partial(_owns, probe))
    try:
        return bool(other.result(time.monotonic() + _LOCK_ANSWER_S))
    finally:
        other.end()


def _owns(probe: Path) -> bool:
    try:
        with owned(probe, patience_s=0):
            return True
    except ConfigurationError:
        return False


def _clock(folder: Path, skew: float) -> Finding:
    """`skew`: by how many seconds the file system's clock is ahead of ours."""
    if abs(skew) <= _SKEW_S:
        return ok("file-clock", f"{folder}: new files have the time of this machine's clock")
    where = "ahead of" if skew > 0 else "behind"
    return warning(
        "file-clock",
        f"{folder}: new files are {abs(skew):.0f} s {where} this machine's clock",
        "Have both machines' clocks set by NTP (chronyc tracking, timedatectl).",
    )


def _space(folder: Path, probe: Path) -> Finding:
    status = os.statvfs(probe)
    free = status.f_bavail * status.f_frsize
    found = f"{folder}: {free / 1024**3:.1f} GiB free"
    remedy = "A checkpoint takes three to four times the size of the weights, and several are kept: free some space."
    if status.f_files and not status.f_favail:
        return failure("disk-space", f"{found}, but no more files can be made (no inodes left)", "Remove some files.")
    if free < _NO_SPACE:
        return failure("disk-space", found, remedy)
    return warning("disk-space", found, remedy) if free < _LITTLE_SPACE else ok("disk-space", found)
