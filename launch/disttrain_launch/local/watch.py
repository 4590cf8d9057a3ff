"""The watch over the workers of a group: what the end of each, and each signal, means to the others."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from disttrain.distributed.ports import reserved_port
from disttrain.distributed.requests import SAME_REQUEST_S, STOP_SIGNALS, asking
from disttrain.distributed.suspended import LOOK_EVERY_S, Suspended
from disttrain.distributed.verdicts import Verdict
from disttrain.errors import DisttrainError
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.hung import hung_ranks
from disttrain_launch.local.worker import Member
from disttrain_launch.messages import complain
from disttrain_launch.outcome import Outcome, settle

# A rank that can report why it gives up is seldom the only one, and may not be the first: the others have this long
# to report what happened to them.
_TO_REPORT_S = 2.0
_NEVER = float("inf")
_LOOK_FOR_NEWCOMERS_EVERY_S = 0.05
MOST_LOSSES = 10
"""After so many within ten minutes a run does not continue: they have a cause."""
_LOSSES_WITHIN_S = 600.0


class Watch:
    """Waits for workers to end and for signals to arrive, and passes on what each means to the others."""

    def __init__(
        self,
        group: WorkerGroup,
        workers: Sequence[Member],
        signals: int,
        replace: Callable[[Any], Member | None],
        port: int,
        max_losses: int = MOST_LOSSES,
    ) -> None:
        """`port`: where the workers meet; another one each time that rank 0, which serves there, is lost."""
        self._group = group
        self._workers: list[Member] = [*workers]
        self._is_only_worker = len(workers) == 1
        self._signals = signals
        self._suspended = Suspended()
        self._stop_requested_at: float | None = None  # this and the next two: time.monotonic()
        self._terminate_at = _NEVER
        self._kill_at = _NEVER
        self._replace = replace
        self._losses: list[float] = []  # when, by time.monotonic()
        self._max_losses = max_losses
        self._coming: list[Member] = []  # replacements, which do not count yet
        self._new: list[Member] = []  # of the workers, those that do not have the state of the run yet
        self._generation, self._host, self._port = 0, "", port
        self._ports = ExitStack()  # while they are in use
        self._console_was_lost = False

    def until_the_end(self) -> Outcome:
        """Wait until no worker runs any more."""
        with self._ports:
            return self._until_the_end()

    def _until_the_end(self) -> Outcome:
        while running := self._still_running():
            if self._continues_in_another_group(running):
                continue
            self._end_after_a_failure(running)
            for news in self._suspended.news({worker.rank: worker.pid for worker in running if worker.pid}):
                complain(news)
            for number in self._next_signals():
                if number in STOP_SIGNALS and self._is_second_request(number):
                    return Outcome(128 + signal.SIGINT, "killed on request")
        return settle(
            [worker.ending for worker in self._workers if worker.ending],
            stop_requested=self.was_asked_to_stop,
            is_only_worker=self._is_only_worker,
        )

    def _still_running(self) -> list[Member]:
        """The workers that have not ended, without newcomers that can no longer join: those count for nothing."""
        running = [worker for worker in self._workers if not worker.has_ended()]
        self._new = [worker for worker in self._new if worker.ending or worker.waits_to_join()]
        others = [worker for worker in self._workers if worker not in self._new]
        if any(worker.is_through() for worker in others):
            late, self._coming = [*self._new, *self._coming], []
            if late and not any(worker.ending and worker.ending.calls_for_an_end for worker in others):
                self._terminate_at = self._kill_at = _NEVER  # if one of the late has failed just now
        elif all(worker.ending for worker in others):  # one of those that failed may be the cause
            late = [worker for worker in self._new if worker in running]
        else:
            return running
        for worker in late:  # so that its log says why; what does not end by itself is killed with the block
            worker.hear(Verdict(self._generation + 1, None))
        self._workers = [worker for worker in self._workers if worker not in late]
        self._new = [worker for worker in self._new if worker not in late]
        return [worker for worker in running if worker not in late]

    @property
    def has_lost_the_console(self) -> bool:
        """Whether a worker that printed to the user was killed, also by this launcher."""
        return self._console_was_lost or self._workers[0].was_killed

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether the launcher was asked to stop."""
        return self._stop_requested_at is not None

    def _continues_in_another_group(self, running: list[Member]) -> bool:
        """Whether a new group forms: some died just now, some have come, or the last one failed."""
        if self._kill_at != _NEVER:
            return False
        self._kill_the_hung()
        self._leave_out_the_corrupt()
        dead = [worker for worker in self._workers if worker.ending and worker.ending.calls_for_an_end]
        has_lost_rank_0 = self._workers[0] in dead
        self._console_was_lost |= has_lost_rank_0 and self._workers[0].was_killed
        new = self._those_to_join()
        if has_lost_rank_0:  # who does not reach the run directory cannot take its place
            running.sort(key=lambda worker: not worker.can_lead())
        has_failed = any(worker.failed_in(self._generation) for worker in running)
        if not dead and not new and not has_failed:
            return False
        now = time.monotonic()
        is_possible = (
            len(dead) + len(running) == len(self._workers)
            and all(worker.was_killed for worker in dead)
            and (not has_lost_rank_0 or running[0].can_lead())
            and all(worker.is_ready() for worker in running)
        )
        num_losses = self._num_losses(dead) + has_failed
        if is_possible and self._num_recent(now) + num_losses > self._max_losses:
            complain(
                f"more than {self._max_losses} losses within {_LOSSES_WITHIN_S / 60:g} minutes (--max-losses): "
                "not continuing"
            )
            is_possible = False
        if not dead and not has_failed and not is_possible:
            return False
        self._generation += 1
        if not is_possible:
            for worker in running:
                worker.hear(Verdict(self._generation, None))
            return False
        if has_lost_rank_0:
            self._host, self._port = self._meeting_place(running[0])
        self._losses += [now] * num_losses
        self._workers = [*running, *new]
        self._new = [worker for worker in (*self._new, *new) if worker in self._workers]
        self._coming = [worker for worker in self._coming if worker not in new]
        verdict = Verdict(
            self._generation,
            rank=None,
            size=len(self._workers),
            num_new=len(new),
            new_ranks=tuple(worker.rank for worker in new),
            lost="; ".join(worker.lost_words() for worker in dead),
            lost_ranks=tuple(worker.rank for worker in dead),
            time=min((worker.ending.time for worker in dead if worker.ending), default=time.time()),
            port=self._port,
            host=self._host,
        )
        for rank, worker in enumerate(self._workers):
            worker.hear(self._verdict_for(worker, dataclasses.replace(verdict, rank=rank)))
        if not self.was_asked_to_stop:
            # One that computed wrong numbers would be replaced on the same machine, and might do so again.
            self._coming += filter(None, [self._replacement(one) for one in dead if not one.computed_wrong])
        return True

    def _num_recent(self, now: float) -> int:
        """How many losses there were within the time for which their number is limited."""
        return sum(now - moment < _LOSSES_WITHIN_S for moment in self._losses)

    def _num_losses(self, dead: Sequence[Member]) -> int:
        """How often these may have been lost for a cause of their own."""
        return len(dead)

    def _meeting_place(self, leader: Member) -> tuple[str, int]:
        """The host and the port at which this worker can meet the others."""
        return "", self._ports.enter_context(reserved_port())

    def _verdict_for(self, worker: Member, verdict: Verdict) -> Verdict:
        """The verdict with this worker's place on its machine, if there are several."""
        return verdict

    def _kill_the_hung(self) -> None:
        reports = {
            rank: worker.hung_in(self._generation) for rank, worker in enumerate(self._workers) if worker.ending is None
        }
        for worker in (self._workers[rank] for rank in hung_ranks(reports)):
            if not worker.was_shot:
                words = "killing it; the stacks of all are in the run's logs"
                complain(f"rank {worker.rank} holds up the others (train.hang_timeout_s): {words}")
                worker.shoot()

    def _leave_out_the_corrupt(self) -> None:
        reports = {
            rank: worker.corrupt_in(self._generation)
            for rank, worker in enumerate(self._workers)
            if worker.ending is None
        }
        for worker in (self._workers[rank] for rank in hung_ranks(reports)):
            if not worker.was_shot:
                complain(f"rank {worker.rank} computes wrong numbers (parallel.audit_every_steps): leaving it out")
                worker.computed_wrong = True
                worker.shoot()

    def _those_to_join(self) -> list[Member]:
        for worker in [one for one in self._coming if one.has_ended()]:
            self._coming.remove(worker)
            what = worker.ending.message if worker.ending is not None else "it ended"
            now = time.monotonic()
            # One that fails by itself would fail again.
            is_tried = worker.was_killed and not self.was_asked_to_stop and self._num_recent(now) < self._max_losses
            another = self._replacement(worker) if is_tried else None
            if another is not None:
                self._losses.append(now)
                complain(f"the replacement for rank {worker.rank} {what}: starting another")
                self._coming.append(another)
            else:
                complain(f"continuing without a replacement for rank {worker.rank}: {what}")
                self._forget(worker)
        return [worker for worker in self._coming[:] if worker.waits_to_join() and not self._refuses(worker)]

    def _replacement(self, dead: Member) -> Member | None:
        """Another in the place of one that has ended, if one can be started: the others do not need it."""
        try:
            return self._replace(dead)
        except (OSError, DisttrainError) as error:  # no process or file is to be had, or its log cannot be written
            complain(f"rank {dead.rank} cannot be replaced: {error}")
            return None

    def _refuses(self, newcomer: Member) -> bool:
        """Whether one that waits to join would compute something else than the others: it is ended."""
        differences = [newcomer.is_unlike(worker) for worker in self._workers if worker.ending is None]
        name = next(iter(differences), None)
        if name is None or None in differences:  # a run may have begun with other versions on its machine
            return False
        self._coming.remove(newcomer)
        newcomer.kill()
        words = f"{name} is not what it was when the run began, and a worker that joins needs it as it was"
        complain(f"continuing without a replacement for rank {newcomer.rank}: {words}")
        self._forget(newcomer)
        return True

    def _forget(self, worker: Member) -> None:
        """Let go of the place of one that has ended before it has joined."""

    def _end_after_a_failure(self, running: list[Member]) -> None:
        now = time.monotonic()
        failed = [worker.ending for worker in self._workers if worker.ending and worker.ending.calls_for_an_end]
        if failed and self._kill_at == _NEVER:
            self._terminate_at = now + (_TO_REPORT_S if failed[0].report else 0.0)
            self._kill_at = self._terminate_at + self._group.grace_s
        if now >= self._kill_at:
            for worker in running:
                worker.kill()
        elif now >= self._terminate_at:
            self._terminate_at = _NEVER
            for worker in running:
                worker.terminate()

    def _next_signals(self) -> bytes:
        ready, _, _ = select.select([self._signals], [], [], self._to_wait_s())
        return os.read(self._signals, 4096) if ready else b""

    def _to_wait_s(self) -> float:
        """How long nothing is to be done but to wait for news."""
        deadline = min(self._terminate_at, self._kill_at)
        look_every_s = _LOOK_FOR_NEWCOMERS_EVERY_S if self._coming or self._new else LOOK_EVERY_S
        return min(look_every_s, max(0.0, deadline - time.monotonic()))

    def _is_second_request(self, number: int) -> bool:
        now = time.monotonic()
        if number == signal.SIGHUP and self.was_asked_to_stop:
            return False  # a terminal that closes sends more than one, and no user is left to mean "at once"
        if self._stop_requested_at is None:
            self._stop_requested_at = now
            complain(asking(number))
            for worker in self._workers:
                worker.terminate()
            return False
        return now - self._stop_requested_at > SAME_REQUEST_S
