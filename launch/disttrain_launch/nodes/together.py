"""A run on several machines that continues without those that are lost.

The machine where all meet leads: it watches the workers of all machines as the launcher of one machine watches its own,
and its verdicts go down each worker's pipe.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from disttrain.agent.finished import is_finished
from disttrain.distributed.requests import STOP_SIGNALS
from disttrain.distributed.verdicts import Verdict
from disttrain.errors import DisttrainError, ExitCode
from disttrain.recipe.address import is_url, working_folder
from disttrain_launch.local.group import WorkerGroup
from disttrain_launch.local.watch import Watch
from disttrain_launch.local.worker import Member
from disttrain_launch.local.workers import signals_heard
from disttrain_launch.messages import complain, say
from disttrain_launch.nodes.follower import TOO_EARLY, Follower
from disttrain_launch.nodes.machine import Machine
from disttrain_launch.nodes.node import Node
from disttrain_launch.nodes.team import Stopped, Team
from disttrain_launch.outcome import Outcome
from disttrain_launch.restarts import Restarts


def run_together(node: Node) -> NoReturn:
    """Run this machine's part to its end, and exit with the code of all workers.

    Raises DisttrainError.
    """
    with signals_heard() as signals:
        # Blocked since `disttrain node` began: the first process of a container would never receive them otherwise.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        with Machine(node) as machine:
            outcome = _outcome(node, machine, signals)
    if outcome.traceback:
        say(outcome.traceback.rstrip(), err=True)
    if outcome.message:
        complain(outcome.message)
    sys.exit(outcome.exit_code)


def _outcome(node: Node, machine: Machine, signals: int) -> Outcome:
    def has_finished() -> bool:
        return is_finished(node.run_dir, node.recipe, node.overrides)

    if node.serves is None and not has_finished():  # else the name may have gone with its machine
        raise DisttrainError(
            f"--rendezvous {node.host}:{node.port}: the name {node.host!r} does not resolve here, so it is unknown "
            "which machine serves it. Give an address, or --node-rank."
        )
    if not node.serves:
        return Follower(node, machine, signals, has_finished).until_the_end()
    if has_finished():
        return Outcome(ExitCode.DONE, f"{node.run_dir} is already finished: there is nothing left to do")
    team = Team(node, machine, signals, node.most_workers or float("inf"))
    try:
        outcome = _led(node, team, signals)
        team.end(outcome)
        return outcome
    except DisttrainError as error:
        team.end(Outcome(error.exit_code, str(error)))
        raise
    finally:
        team.close()


def _led(node: Node, team: Team, signals: int) -> Outcome:
    """Run the workers of all machines, again after failures that are worth a retry."""
    restarts = Restarts(node.max_restarts, _folder_of(node.run_dir), stops_after_loss=node.stops)
    while True:
        try:
            workers = team.assembled()
            watch = _TeamWatch(node, team, workers, signals)
            outcome = watch.until_the_end()
        except Stopped:
            return Outcome(ExitCode.STOPPED, TOO_EARLY)
        finally:
            team.dismiss_all()
        if watch.was_asked_to_stop or not restarts.helps(outcome):
            break
        team.say(f"{outcome.message}. Restart {restarts.made} of {restarts.most} from the latest checkpoint")
    outcome = restarts.settled(outcome)
    if restarts.gave_up:
        return dataclasses.replace(outcome, message=f"{outcome.message}\n{restarts.gave_up}")
    return outcome


def _folder_of(run_dir: str) -> Path:
    return working_folder(run_dir) if is_url(run_dir) else Path(run_dir)


class _TeamWatch(Watch):
    """The watch over the workers of all machines."""

    def __init__(self, node: Node, team: Team, workers: list[Member], signals: int) -> None:
        super().__init__(WorkerGroup((), len(workers)), workers, signals, team.replacement, 0, node.max_losses)
        self._team, self._stop_grace_s, self._was_too_slow = team, node.grace_s, False
        self._stops = node.stops

    def until_the_end(self) -> Outcome:
        """Wait until no worker runs any more."""
        outcome = super().until_the_end()
        if self._was_too_slow:
            words = f"the workers were killed after {self._stop_grace_s} s (--stop-grace)"
            return Outcome(ExitCode.FAILURE, f"ended without a save: {words}")
        return outcome

    def _next_signals(self) -> bytes:
        asked_at = self._stop_requested_at
        if asked_at is not None and time.monotonic() - asked_at > self._stop_grace_s:
            self._was_too_slow = True
            for worker in self._workers:
                worker.kill()
        return self._team.pump(self._to_wait_s())

    def _is_second_request(self, number: int) -> bool:
        if number != signal.SIGINT and self.was_asked_to_stop:
            return False  # a pod or a service may be asked several times
        return super()._is_second_request(number)

    def _those_to_join(self) -> list[Member]:
        if not self.was_asked_to_stop and all(worker.is_ready() for worker in self._workers if not worker.ending):
            self._coming += self._team.newcomers([*self._workers, *self._coming])
        elif self._stops:
            self._team.dismiss_idle()
        return super()._those_to_join()

    def _forget(self, worker: Member) -> None:
        self._team.forget(worker)

    def _num_losses(self, dead: Sequence[Member]) -> int:
        return self._team.num_losses(dead)

    def _meeting_place(self, leader: Member) -> tuple[str, int]:
        return self._team.meeting_place(leader)

    def _verdict_for(self, worker: Member, verdict: Verdict) -> Verdict:
        local_rank, local_size = self._team.local_place(worker, self._workers)
        return dataclasses.replace(verdict, local_rank=local_rank, local_size=local_size)
