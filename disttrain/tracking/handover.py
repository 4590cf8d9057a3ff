"""What it takes to continue the journal of a worker that has died: its latest records, in the memory of another."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any

from disttrain.runs.latest import events_of_this_start

_MOST_KEPT = 32  # a worker that dies has at most one step's records not written


class Event:
    """Something that happened. The same thing, as two workers have it, may differ in what is no key."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name, self.fields = name, fields
        self._key = name, fields.get("step"), fields.get("noticed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class Latest:
    """The latest metrics and events of a worker that keeps no journal."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Mapping[str, float]] | Event] = deque(maxlen=_MOST_KEPT)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep what was measured at a step."""
        self._kept.append((step, metrics))

    def event(self, event: Event) -> None:
        """Keep what happened."""
        self._kept.append(event)

    def first_step(self) -> int | None:
        """The first step of the metrics; None if there are none."""
        return min((what[0] for what in self._kept if not isinstance(what, Event)), default=None)

    def take(self) -> list[tuple[int, Mapping[str, float]] | Event]:
        """All of it, oldest first, which is then kept no more."""
        taken = list(self._kept)
        self._kept.clear()
        return taken


def events_done(journal: str | os.PathLike[str]) -> set[Event]:
    """The events that the journal holds since the job was last started. Raises OSError."""
    return {Event(str(record.get("name")), record) for record in events_of_this_start(journal)}
