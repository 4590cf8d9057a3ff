"""When nothing moves any more: which rank is stuck, where, and an end to it.

Each worker has two threads. One beats: every few seconds it writes to the store that all ranks reach where its main
thread is, its stack included, so that it is known even for a process that has been stopped or whose machine is gone.
The other judges, from what it knows, without ever waiting for the network. It strikes when no rank has made progress
for `train.hang_timeout_s`: names the ranks that hold up the others, writes this process's stacks to its log, and ends
the process.

A main thread that holds the interpreter in C code silences both threads: then faulthandler's own timer, which the judge
keeps winding up, writes the stacks and ends the process, while the other ranks report whose beats have stopped.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from torch._C._distributed_c10d import Store

from disttrain.distributed.collectives import gather_objects, num_issued
from disttrain.distributed.world import World, way_to_the_store
from disttrain.files import open_to_append
from disttrain.health.progress import Progress
from disttrain.health.stacks import innermost, waits_for_others
from disttrain.layout import LOGS, log_name

_KEY = "disttrain/beat"
_LONGEST_INTERVAL_S = 5.0
_STORE_TIMEOUT_S = 2.0
# A rank whose beats have stopped for so many intervals counts as silent.
_SILENT_INTERVALS = 3
_LEAST_SILENCE_S = 2.0
# faulthandler strikes so much later than the verdict, which is more specific, and whose thread may be late on a busy
# machine.
_LEAST_MARGIN_S = 10.0
# The ranks judge within some intervals of each other, and only what all say counts.
_TO_BE_CURED_S = 30.0


@dataclass(frozen=True)
class Beat:
    """A rank's report about itself.

    `issued`: how many collectives it has begun; `still_s`: seconds since it last made progress; `stack`: innermost call
    first.
    """

    rank: int
    host: str
    pid: int
    number: int
    stage: str
    step: int
    place: int
    issued: int
    patient: bool
    still_s: float
    waits: bool
    stack: tuple[str, ...]

    def where(self) -> str:
        """What it was doing, in words."""
        what = f"at step {self.step}, {self.stage}" if self.step else self.stage
        return f"{what} ({self.stack[0]})" if self.stack else what


@dataclass(frozen=True)
class _Heard:
    """A rank's newest beat, and when this process learned of it (by time.monotonic)."""

    beat: Beat
    at: float


class Watchdog:
    """Watches the progress of all ranks while the block runs. Every rank must enter it.

    Args:
        world: of this worker.
        progress: of its main thread, to whose thread this object must belong.
        timeout_s: how long it may take until any rank makes progress.
        log: the file that gets the stacks.
        end: called with the verdict, on a thread of the watchdog's; it should end the process.
    """

    def __init__(
        self, world: World, progress: Progress, timeout_s: float, log: Path, end: Callable[[str], None]
    ) -> None:
        self._world, self._progress, self._timeout_s, self._log, self._end = world, progress, timeout_s, log, end
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 8)
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        self._moved_at, self._ticks = time.monotonic(), progress.ticks
        self._heard: dict[int, _Heard] = {}
        self._number = 0
        self._beating: list[threading.Thread] = []  # those of groups before may still wait for the store
        self._judging: threading.Thread | None = None
        self._asked_at: float | None = None  # for a cure
        self.cure: Callable[[Sequence[int]], bool] | None = None
        """Called with the ranks that hold up the others, or with none once they do not any more.

        True if they may be dealt with: the end then waits for it."""

    def __enter__(self) -> Self:
        self._stacks: IO[bytes] = open_to_append(self._log)
        self._begin()
        return self

    def _begin(self) -> None:
        connect, closed, heard = way_to_the_store(_STORE_TIMEOUT_S), self._closed, self._heard
        for beat in gather_objects(self._own_beat()):
            self._hear(beat, heard)
        self._beating.append(
            threading.Thread(target=self._beat_on, args=(connect, closed, heard), name="disttrain-beats", daemon=True)
        )
        self._judging = threading.Thread(target=self._judge, name="disttrain-judge", daemon=True)
        self._beating[-1].start()
        self._judging.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_judging()
        for thread in self._beating:
            # One that is in the store's C++ code must not be there when Python ends.
            thread.join(_STORE_TIMEOUT_S * (self._world.size + 1))
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _end_judging(self) -> None:
        self._closed.set()
        if self._judging is not None:
            self._judging.join(_STORE_TIMEOUT_S * (self._world.size + 1))

    def pause(self) -> None:
        """Judge nobody, as the group that this is about has broken; a process that is stuck ends all the same."""
        self._end_judging()
        self._asked_at = None
        faulthandler.dump_traceback_later(2 * self._timeout_s + _TO_BE_CURED_S, exit=True, file=self._stacks)

    def resume(self, world: World) -> None:
        """Watch the ranks of another group. Every rank of it must call it."""
        self._world, self._heard, self._closed = world, {}, threading.Event()
        self._begin()

    def _beat_on(self, connect: Callable[[], Store] | None, closed: threading.Event, heard: dict[int, _Heard]) -> None:
        store: Store | None = None
        while not closed.wait(self._interval_s):
            if connect is not None:
                with suppress(RuntimeError):  # the store's end is gone, or stands still: silence is answer enough
                    store = store or connect()
                    self._beat(store, heard)

    def _beat(self, store: Store, heard: dict[int, _Heard]) -> None:
        self._number += 1
        store.set(f"{_KEY}/{self._world.rank}", json.dumps(asdict(self._own_beat())))
        looks = self._still_s() > self._timeout_s / 2
        # Rank 0's is looked at all along: where it serves the store, nothing can be learned once it stands still.
        for rank in range(self._world.size if looks else 1):
            if rank != self._world.rank:
                with suppress(RuntimeError):  # it has not beaten yet, but for its report at the start
                    self._hear(_decoded(store.get(f"{_KEY}/{rank}")), heard)

    def _hear(self, beat: Beat, heard: dict[int, _Heard]) -> None:
        if beat.rank == self._world.rank:
            return
        before = heard.get(beat.rank)
        if before is None or before.beat.number != beat.number:
            heard[beat.rank] = _Heard(beat, time.monotonic())

    def _own_beat(self) -> Beat:
        progress, frame = self._progress, sys._current_frames().get(self._main_thread)
        return Beat(
            rank=self._world.rank,
            host=self._world.host,
            pid=os.getpid(),
            number=self._number,
            stage=progress.stage,
            step=progress.step,
            place=progress.place,
            issued=num_issued(self._world.device, self._world.sums),
            patient=progress.patient,
            still_s=round(self._still_s(), 1),
            waits=waits_for_others(frame),
            stack=innermost(frame),
        )

    def _still_s(self) -> float:
        """How long ago the main thread made progress, as far as it was checked."""
        now = time.monotonic()
        if self._ticks != self._progress.ticks:
            self._ticks, self._moved_at = self._progress.ticks, now
        return now - self._moved_at

    def _judge(self) -> None:
        while not self._closed.wait(min(1.0, self._interval_s)):
            # Strikes if this thread is kept from running, by a main thread that does not let go of the interpreter.
            timeout_s = self._timeout_s + max(_LEAST_MARGIN_S, self._interval_s)
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._stacks)
            is_still = self._still_s() >= self._timeout_s and not self._progress.patient
            found = self._verdict(time.monotonic()) if is_still else None
            is_known = self._asked_at is not None
            may_be_cured = self._may_be_cured(found[1] if found is not None else ())
            if found is None or self._closed.is_set():
                continue
            verdict, _ = found
            if not is_known:  # also if it can be cured: nothing else would show where it was stuck
                self._write(verdict)
            if not may_be_cured:
                self._end(verdict)
                return

    def _write(self, verdict: str) -> None:
        self._stacks.write(f"{verdict}\n".encode())
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _may_be_cured(self, culprits: Sequence[int]) -> bool:
        """Ask for it, if there are any; take it back, if there are none any more."""
        if self.cure is None or (self._asked_at is None and not culprits):
            return False
        now = time.monotonic()
        asked_at = self._asked_at if self._asked_at is not None else now
        self._asked_at = asked_at if self.cure(culprits) and culprits else None
        return self._asked_at is not None and now - asked_at < _TO_BE_CURED_S

    def _verdict(self, now: float) -> tuple[str, list[int]] | None:
        """What holds all ranks up, and which do; None as long as one may not be held up."""
        beats = {heard.beat.rank: heard.beat for heard in list(self._heard.values())}
        beats[self._world.rank] = self._own_beat()
        silence_s = {heard.beat.rank: now - heard.at for heard in list(self._heard.values())}
        limit_s = max(_LEAST_SILENCE_S, _SILENT_INTERVALS * self._interval_s)
        if self._world.size > 1 and self._still_s() < self._timeout_s / 2 + limit_s + 2 * self._interval_s:
            return None  # the others' beats have not been looked at for long enough to know who is silent
        silent = [rank for rank, seconds in sorted(silence_s.items()) if seconds > limit_s]
        for rank, beat in beats.items():
            still_s = beat.still_s + silence_s.get(rank, 0.0)
            if rank not in silent and (beat.patient or still_s < self._timeout_s - self._interval_s):
                return None
        said = f"no worker has made progress for {self._timeout_s:g} s (train.hang_timeout_s): "
        words, culprits = _account(beats, silent, silence_s, beats[self._world.rank])
        return said + words, culprits


def _account(
    beats: Mapping[int, Beat], silent: Sequence[int], silence_s: Mapping[int, float], own: Beat
) -> tuple[str, list[int]]:
    """In words, the ranks that hold up the others: the silent, else those behind, else those that wait for none."""
    if silent:
        words = [
            f"rank {rank} on {beats[rank].host} (process {beats[rank].pid}) has not been heard from for "
            f"{silence_s[rank]:.0f} s, last {beats[rank].where()}: it was stopped or is stuck in C code, or its "
            "machine is gone or cut off"
            for rank in silent
        ]
        return f"{'; '.join(words)}. Rank {own.rank} waits for it {own.where()}.", list(silent)
    first = min((beat.place, beat.issued) for beat in beats.values())
    culprits = [beat for beat in beats.values() if (beat.place, beat.issued) == first]
    if len(culprits) == len(beats):
        culprits = [beat for beat in beats.values() if not beat.waits] or culprits
    words = [f"rank {beat.rank} on {beat.host} (process {beat.pid}) is stuck {beat.where()}" for beat in culprits]
    rest = "" if len(culprits) == len(beats) else "; the other ranks wait for it"
    said = "; ".join(words) + f"{rest}. The stacks of all are in the run's {LOGS}/{log_name('RANK')}."
    return said, [beat.rank for beat in culprits]


def _decoded(text: bytes) -> Beat:
    fields: dict[str, Any] = json.loads(text)
    return Beat(**fields | {"stack": tuple(fields["stack"])})
