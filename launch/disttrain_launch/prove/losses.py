"""Single workers that are killed while the others continue, and how long each such loss holds up the run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from disttrain.runs.journal import read_records

_POLL_S = 0.01
# The last steps are left alone: a worker that dies when another one has nothing left to do restarts the run.
_MARGIN_STEPS, _MARGIN_S = 5, 1.0
_LONGEST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, about: seconds from its start to its first step, and from step to step."""

    start_up_s: float
    step_s: float

    def steps_for(self, losses: int, workers: int) -> int:
        """How many steps a run of so many workers should have for so many losses, with time for replacements."""
        seconds = losses * (0.5 + self.start_up_s / max(1, workers - 1))
        return round(seconds / max(self.step_s, 1e-4))


@dataclass(frozen=True)
class Loss:
    """A worker that was killed: its rank at that time, and seconds from its SIGKILL to the next step."""

    rank: int
    seconds: float


class Group:
    """The workers that make the steps of a run since it was last started, as its journal has them."""

    def __init__(self, journal: Path, size: int) -> None:
        """To be made before the start."""
        self.step = 0
        self.restarts = 0
        self.losses = 0
        self.num_steps = 0
        """How many steps were made since the group last changed."""
        self.step_time = 0.0
        """When the first of those was made."""
        self.is_saved = False
        """Whether a checkpoint is there that was made since the last loss."""
        self.size = size
        self._journal, self._offset, self._since = journal, 0, time.time()
        self._has_started = False
        self._places: list[int] = []

    @property
    def places(self) -> list[int]:
        """By rank, as which rank each one was started; empty until it is known."""
        return list(self._places)

    def read(self) -> None:
        """Take in what was journalled since."""
        if not self._journal.exists():
            return
        for record, offset in read_records(self._journal, self._offset):
            self._offset = offset
            if record is not None and record.get("time", 0.0) >= self._since:
                self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        match record:
            case {"kind": "metrics", "step": step, "metrics": {"train/loss": _}}:
                self.step, self.num_steps = step, self.num_steps + 1
                if self.num_steps == 1:
                    self.step_time = record["time"]
            case {"name": "start" | "resume"}:
                self.restarts += self._has_started
                self._has_started = True
                self._change(list(range(self.size)))
            case {"name": "worker-lost", "lost_ranks": lost}:
                self.losses, self.is_saved = self.losses + 1, False
                self._change([rank for rank in self._places if rank not in lost])
            case {"name": "worker-joined", "joined_ranks": joined}:
                self._change([*self._places, *joined])
            case {"name": "checkpoint"}:
                self.is_saved = True

    def _change(self, places: list[int]) -> None:
        self._places, self.num_steps = places, 0


class Losses:
    """Kills single workers of a run, each once the others have continued after the one before.

    Args:
        workers: gives the run's worker processes by the rank that each was started as.
        pause: waits for a moment; False if the run has ended.
        num_steps: how many the whole run has.
        draw: by which it draws the moments and the victims.
    """

    def __init__(
        self,
        workers: Callable[[], Mapping[int, psutil.Process]],
        pause: Callable[[float], bool],
        num_steps: int,
        pace: Pace,
        draw: random.Random | None = None,
    ) -> None:
        self.made: list[Loss] = []
        self._workers, self._pause, self._pace = workers, pause, pace
        self._draw = draw or random.Random(random.random())
        self._last_step = num_steps - max(_MARGIN_STEPS, round(_MARGIN_S / max(pace.step_s, 1e-4)))

    def deal(self, group: Group, most: int, until: int) -> None:
        """Kill up to `most` workers of the group before step `until`. Returns early if the run ends."""
        last = min(until, self._last_step)
        for left in range(most, 0, -1):
            if not self._lose_one(group, left, last):
                return

    def _lose_one(self, group: Group, left: int, last: int) -> bool:
        """Whether one was lost: not if the run comes to step `last` before."""
        room_s = (last - group.step) * self._pace.step_s / left
        # A full group takes a replacement's start to wait for, and so does any group once all but one are lost.
        least = group.size if room_s > 2 * self._pace.start_up_s or self._draw.random() < 0.2 else 2
        due = None
        while True:
            group.read()
            if group.step >= last:
                return False
            is_ready = len(group.places) >= least and group.num_steps > 1
            if is_ready and due is None:
                due = time.monotonic() + self._draw.uniform(0.0, min(_LONGEST_PAUSE_S, max(room_s / 2, 0.05)))
                rank = self._draw.randrange(len(group.places))
            # Rank 1 keeps a copy of what rank 0 is saving, for the case that this dies. Both would be lost together.
            if is_ready and due is not None and time.monotonic() >= due and (rank > 0 or group.is_saved):
                if rank < len(group.places) and self._kill(group, rank):
                    return True
                due = None
            if not self._pause(_POLL_S):
                return False

    def _kill(self, group: Group, rank: int) -> bool:
        """Whether it was killed, and the others have continued."""
        worker = self._workers().get(group.places[rank])
        if worker is None:
            return False
        before, killed_at = (group.losses, group.restarts), time.time()
        with suppress(psutil.NoSuchProcess):
            worker.kill()
        while (group.losses, group.restarts) == before or group.num_steps == 0:
            if not self._pause(_POLL_S):
                return False
            group.read()
        self.made.append(Loss(rank, round(group.step_time - killed_at, 3)))
        return True
