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
from types import FrameType, TracebackType
from typing import IO, Any, Self

from torch._C._distributed_c10d import Store

from disttrain.distributed.collectives import gather_objects, num_issued
from disttrain.distributed.world import World, store_for_a_thread
from disttrain.files import open_to_append
from disttrain.health.progress import Progress
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
_MOST_FRAMES = 4
# A rank in one of these waits for the others: it does not hold them up. On a GPU that is where it waits for the step.
_WAITING_FILES = (
    "torch/distributed/",
    "torch/nn/parallel/distributed.py",
    "disttrain/distributed/collectives.py",
    "disttrain/health/nonfinite.py",
)
_WAITING_FUNCTIONS = ("_engine_run_backward",)  # in DDP the gradients of all meet at its end


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
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        store = store_for_a_thread(_STORE_TIMEOUT_S)
        for beat in gather_objects(self._own_beat()):
            self._hear(beat)
        self._stacks: IO[bytes] = open_to_append(self._log)
        for name, target in (("beats", lambda: self._beat_on(store)), ("judge", self._judge)):
            thread = threading.Thread(target=target, name=f"disttrain-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            # One that is in the store's C++ code must not be there when Python ends.
            thread.join(_STORE_TIMEOUT_S * (self._world.size + 1))
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def _beat_on(self, store: Store | None) -> None:
        while not self._closed.wait(self._interval_s):
            if store is not None:
                with suppress(RuntimeError):  # the store's end is gone, or stands still: silence is answer enough
                    self._beat(store)

    def _beat(self, store: Store) -> None:
        self._number += 1
        store.set(f"{_KEY}/{self._world.rank}", json.dumps(asdict(self._own_beat())))
        looks = self._still_s() > self._timeout_s / 2
        # Rank 0's is looked at all along: where it serves the store, nothing can be learned once it stands still.
        for rank in range(self._world.size if looks else 1):
            if rank != self._world.rank:
                with suppress(RuntimeError):  # it has not beaten yet, but for its report at the start
                    self._hear(_decoded(store.get(f"{_KEY}/{rank}")))

    def _hear(self, beat: Beat) -> None:
        if beat.rank == self._world.rank:
            return
        before = self._heard.get(beat.rank)
        if before is None or before.beat.number != beat.number:
            self._heard[beat.rank] = _Heard(beat, time.monotonic())

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
            issued=num_issued(self._world.device),
            patient=progress.patient,
            still_s=round(self._still_s(), 1),
            waits=_waits(frame),
            stack=_innermost(frame),
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
            if self._still_s() < self._timeout_s or self._progress.patient:
                continue
            verdict = self._verdict(time.monotonic())
            if verdict is not None and not self._closed.is_set():
                self._stacks.write(f"{verdict}\n".encode())
                faulthandler.dump_traceback(file=self._stacks, all_threads=True)
                self._end(verdict)
                return

    def _verdict(self, now: float) -> str | None:
        """What holds all ranks up; None as long as one may not be held up."""
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
        return said + _account(beats, silent, silence_s, beats[self._world.rank])


def _account(beats: Mapping[int, Beat], silent: Sequence[int], silence_s: Mapping[int, float], own: Beat) -> str:
    """The ranks that hold up the others: the silent, else those behind, else those that wait for none."""
    if silent:
        words = [
            f"rank {rank} on {beats[rank].host} (process {beats[rank].pid}) has not been heard from for "
            f"{silence_s[rank]:.0f} s, last {beats[rank].where()}: it was stopped or is stuck in C code, or its "
            "machine is gone or cut off"
            for rank in silent
        ]
        return f"{'; '.join(words)}. Rank {own.rank} waits for it {own.where()}."
    first = min((beat.place, beat.issued) for beat in beats.values())
    culprits = [beat for beat in beats.values() if (beat.place, beat.issued) == first]
    if len(culprits) == len(beats):
        culprits = [beat for beat in beats.values() if not beat.waits] or culprits
    words = [f"rank {beat.rank} on {beat.host} (process {beat.pid}) is stuck {beat.where()}" for beat in culprits]
    rest = "" if len(culprits) == len(beats) else "; the other ranks wait for it"
    return "; ".join(words) + f"{rest}. The stacks of all are in the run's {LOGS}/{log_name('RANK')}."


def _decoded(text: bytes) -> Beat:
    fields: dict[str, Any] = json.loads(text)
    return Beat(**fields | {"stack": tuple(fields["stack"])})


def _innermost(frame: FrameType | None) -> tuple[str, ...]:
    """The innermost calls, those of torch and of this package last: where a user would look first."""
    users: list[str] = []
    others: list[str] = []
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        is_ours = f"{os.sep}disttrain{os.sep}" in path or f"{os.sep}torch{os.sep}" in path or path.startswith("<")
        (others if is_ours else users).append(f"{path}:{frame.f_lineno} in {name}")
        frame = frame.f_back
    # What runs the worker (runpy, click) is not the user's code, and stands at the outer end.
    users = [line for line in users if f"{os.sep}click{os.sep}" not in line and "runpy" not in line]
    return tuple([*users, *others][:_MOST_FRAMES])


def _waits(frame: FrameType | None) -> bool:
    """Whether the main thread waits for other ranks, as far as its stack shows."""
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        if any(part in path for part in _WAITING_FILES) or frame.f_code.co_name in _WAITING_FUNCTIONS:
            return True
        if "/torch/" not in path:
            return False
        frame = frame.f_back
    return False
