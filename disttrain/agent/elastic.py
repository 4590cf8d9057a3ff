"""torchrun's agent, extended by the meaning of disttrain's exit codes.

torchrun restarts the workers after every failure, exits with 1 whatever their code was, and kills workers that take
longer than a few seconds to save. This one restarts them only where that can help, gives them time to save,
informs the other nodes why the job ends, and exits with the right code.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from disttrain.agent.cause import Bulletin, Cause, first_cause
from disttrain.distributed.ending import Ending, left_early
from disttrain.distributed.report import says_finished
from disttrain.distributed.requests import SAME_REQUEST_S, STOP_SIGNALS, asking
from disttrain.distributed.suspended import Suspended
from disttrain.errors import ExitCode

# Workers that wait for a dead one cannot save any more: between SIGTERM and SIGKILL there is nothing to wait for.
_TO_END_S = 5
# A worker that a request to stop ended before it was ready leaves others waiting for it.
_TO_FOLLOW_S = 15.0
_TO_HEAR_THE_CAUSE_S = 3.0
_POLL_S = 0.1


class StoppedOnRequest(Exception):
    """This node was asked to stop, and its workers have ended: what follows for the job."""

    def __init__(self, end: Cause) -> None:
        super().__init__(end.message)
        self.end = end


class Agent(LocalElasticAgent):
    """The workers of this machine, among those of the others.

    Args:
        grace_s: how long workers that are asked to stop may take to save.
        host: what this machine is called in messages.
        newest_step: the run's newest step, as far as can be seen from here; None where it cannot be seen.
        is_finished: whether it has been trained to its end, as far as can be seen from here.
        say: for messages to the user.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        *,
        grace_s: int,
        host: str,
        newest_step: Callable[[], int | None],
        is_finished: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec=spec, logs_specs=logs_specs)
        self.cause: Cause | None = None
        self._grace_s, self._host, self._say = grace_s, host, say
        self._newest_step, self._is_finished = newest_step, is_finished
        self._failed_at: int | None = None
        self._suspended = Suspended()

    def bulletin(self) -> Bulletin | None:
        """The bulletin of the round of rendezvous under way, if there was one."""
        group = self._worker_group
        if group.store is None:
            return None
        return Bulletin(group.store, group.group_rank or 0, group.group_world_size or 1)

    def exit_codes(self) -> list[int | None]:
        """Those of the workers, by local rank; None for one that runs."""
        return [handler.proc.poll() for handler in self._handlers()]

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            result: RunResult = super()._invoke_run(role)
        except SignalException as request:
            # Not left to torchrun, whose `run` would kill in a few seconds what has not ended.
            raise StoppedOnRequest(self._stop(request.sigval)) from None
        return result

    def _stop(self, request: signal.Signals) -> Cause:
        """Have the workers save and end, and agree with the other nodes on how the job ends."""
        kill = ignore_requests()
        killed = ""
        were_running = None in self.exit_codes()
        if were_running:
            self._say(asking(request))
            if not self._ended_by_request(kill):
                killed = "on request" if kill.is_set() else f"after {self._grace_s} s (--stop-grace)"
            super()._shutdown(signal.SIGKILL, _TO_END_S)
        codes = self.exit_codes()
        if codes and not any(codes) and self._left_early(self._worker_group) is None:
            return Cause(ExitCode.DONE, "")
        has_saved = ExitCode.STOPPED in codes
        if has_saved:
            cause = first_cause(self._failures(), self._host)
        elif not were_running or -signal.SIGTERM in codes:
            when = "between two attempts" if codes and not were_running else "before the workers were ready"
            cause = Cause(ExitCode.STOPPED, f"stopped {when}; run the same command again")
        elif killed:
            cause = Cause(ExitCode.FAILURE, f"the workers were killed {killed}")
        else:
            cause = first_cause(self._failures(), self._host)
        bulletin = self.bulletin()
        if bulletin is not None:
            cause = bulletin.end_of_all(cause, _TO_HEAR_THE_CAUSE_S, is_sure=has_saved)
        return cause if cause.is_final else replace(cause, message=f"ended without a save: {cause.message}")

    def _ended_by_request(self, kill: threading.Event) -> bool:
        """Send the workers SIGTERM, and wait until they have ended; whether they did before they had to be killed."""
        for handler in self._handlers():
            if handler.proc.poll() is None:
                handler.close(death_sig=signal.SIGTERM)
                handler.close(death_sig=signal.SIGCONT)  # one that has been stopped could not save
        deadline = time.monotonic() + self._grace_s
        while None in (codes := self.exit_codes()):
            if kill.is_set() or time.monotonic() >= deadline:
                return False
            if -signal.SIGTERM in codes:
                deadline = min(deadline, time.monotonic() + _TO_FOLLOW_S)
            time.sleep(_POLL_S)
        return True

    def _handlers(self) -> list[Any]:
        """torchrun's handlers of the workers' processes, by local rank."""
        return [handler for _, handler in sorted(getattr(self._pcontext, "subprocess_handlers", {}).items())]

    def _running(self, worker_group: WorkerGroup) -> dict[int, int]:
        """The process ids of the workers of this node that run, by rank."""
        processes = [handler.proc for handler in self._handlers()]
        return {
            worker.global_rank: process.pid
            for worker, process in zip(worker_group.workers, processes, strict=False)  # before they are started: none
            if process.poll() is None
        }

    def _failures(self) -> dict[int, ProcessFailure]:
        """Of the workers of this node, all of which have ended, by rank."""
        result = self._pcontext.wait(0) if self._pcontext is not None else None
        workers = self._worker_group.workers
        failures = result.failures if result is not None else {}
        return {workers[local_rank].global_rank: failure for local_rank, failure in failures.items()}

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _TO_END_S) -> None:
        super()._shutdown(signal.SIGTERM, _TO_END_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        for news in self._suspended.news(self._running(worker_group)):
            self._say(news)
        bulletin = self.bulletin()
        early = self._left_early(worker_group)
        if early is not None and result.state in (WorkerState.HEALTHY, WorkerState.SUCCEEDED):
            result = RunResult(state=WorkerState.FAILED)
        if bulletin is None or result.state not in (WorkerState.HEALTHY, WorkerState.FAILED):
            return result
        if result.state is WorkerState.HEALTHY:
            ended = bulletin.ended()
            if ended is None:
                return result
            self.cause = ended
            self._remaining_restarts = 0
            return RunResult(state=WorkerState.FAILED)
        cause = first_cause(result.failures, self._host)
        if early is not None and (cause.is_consequence or not result.failures):
            cause = early
        self.cause = bulletin.first_of_all(cause, _TO_HEAR_THE_CAUSE_S)
        if not self.cause.is_final and self._is_finished():  # it failed after the end: the others will not return
            self.cause = None
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(result.failures))
        if not self.cause.is_final:
            self._give_up_where_it_stands_still()
        if self.cause.is_final or self._remaining_restarts == 0:
            self._remaining_restarts = 0
            bulletin.announce(self.cause)
        return result

    def _left_early(self, worker_group: WorkerGroup) -> Cause | None:
        """A worker of this node that ended with 0, which torch takes for success, but did not finish."""
        error_files = getattr(self._pcontext, "error_files", {})
        for local_rank, code in enumerate(self.exit_codes()):
            if code == ExitCode.DONE and not says_finished(error_files[local_rank]):
                rank = worker_group.workers[local_rank].global_rank
                return Cause(ExitCode.FAILURE, Ending(rank, ExitCode.FAILURE, time.time(), left_early()).told())
        return None

    def _give_up_where_it_stands_still(self) -> None:
        """A restart does not help a job that has made no progress since the previous failure."""
        assert self.cause is not None
        before, now = self._failed_at, self._newest_step()
        self._failed_at = now
        if before is not None and before == now and self._remaining_restarts > 0:
            self._say(f"it failed again without completing a step since the restart (step {now}): giving up")
            self._remaining_restarts = 0

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY:  # a node waits to join: a new one, or one whose workers failed
            bulletin = self.bulletin()
            elsewhere = bulletin.first() if bulletin is not None else None
            why = f"{elsewhere.message}. " if elsewhere is not None else "another node has joined or left. "
            self._say(f"{why}The workers of all nodes restart from the latest checkpoint")
        else:
            most = worker_group.spec.max_restarts
            why = f"{self.cause.message}. " if self.cause is not None else ""
            self._say(f"{why}Restart {most - self._remaining_restarts} of {most} from the latest checkpoint")
        super()._restart_workers(worker_group)


def ignore_requests() -> threading.Event:
    """From now on requests to stop are ignored, except another Ctrl-C, which sets the event.

    A pod or a service may be asked to stop several times while it saves; SIGKILL remains.
    """
    kill, began = threading.Event(), time.monotonic()

    def interrupted(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > SAME_REQUEST_S:
            kill.set()

    for number in STOP_SIGNALS:
        signal.signal(number, interrupted if number == signal.SIGINT else signal.SIG_IGN)
    return kill
