"""What a journal says last: of the run's status, of its steps, and since it was started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from disttrain.files import open_to_read
from disttrain.runs.journal import decode


def last_status(path: str | os.PathLike[str]) -> str | None:
    """The last status in a journal; None if there is none, or no journal that can be read."""
    status = None
    with contextlib.suppress(OSError):
        for record in _of_kind("status", path):
            status = record.get("status")
    return status if isinstance(status, str) else None


def events_of_this_start(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events that a journal holds since the job was last started. Raises OSError."""
    events: list[dict[str, Any]] = []
    for record in _of_kind("event", path):
        if record.get("name") in ("start", "resume"):
            events.clear()
        else:
            events.append(record)
    return events


def last_step(path: str | os.PathLike[str]) -> int:
    """The step of the last metrics in a journal; 0 if there are none, or no journal that can be read."""
    step = 0
    with contextlib.suppress(OSError):
        for record in _of_kind("metrics", path):
            step = record["step"]
    return step


def _of_kind(kind: str, path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of one kind, without the time that decoding all others would take, and one that is being written."""
    word = b'"%s"' % kind.encode()
    with open_to_read(path) as file:
        for line in file:
            is_whole = word in line and line.endswith(b"\n")
            if is_whole and (record := decode(line)) is not None and record["kind"] == kind:
                yield record
