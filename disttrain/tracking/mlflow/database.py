"""MLflow's database in a file, which several senders may find missing at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disttrain.files import make_folder, open_safely

_PATIENCE_S = 60.0


def is_database(uri: str) -> bool:
    """Whether MLflow itself opens the database at `uri`, and there is no server in between."""
    return not uri.startswith(("http://", "https://", "databricks"))


@contextmanager
def one_at_a_time(uri: str, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Keep other senders from an SQLite database while the block runs; after `patience_s` it runs all the same.

    MLflow makes the tables of a new database without a lock: of several processes that begin together, all but one
    fail, and may leave it half made.
    """
    from sqlalchemy.exc import ArgumentError

    try:
        descriptor = _open_lock(uri)
    except (OSError, ValueError, ArgumentError):  # no URI, or an unwritable folder: MLflow's own error follows
        descriptor = None
    if descriptor is None:
        yield
        return
    try:
        _wait_for(descriptor, patience_s)
        yield
    finally:
        os.close(descriptor)


def _open_lock(uri: str) -> int | None:
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url  # as MLflow reads it, down to what is quoted in a file's name

    name = make_url(uri).database
    if name in (None, "", ":memory:"):
        return None
    path = Path(str(name))
    make_folder(path.parent)
    return open_safely(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT)


def _wait_for(descriptor: int, patience_s: float) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return
        else:
            return
