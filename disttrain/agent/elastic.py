"""torchrun's agent, told what disttrain's exit codes mean.

torchrun starts the workers again after every failure, and exits with 1 whatever their code was. This one starts them
again only where that can help, tells the other nodes why the job ends, and knows the code to end with.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

from disttrain.agent.cause import Bulletin, Cause, first_cause, left_early
from disttrain.errors import ExitCode
from disttrain.report import says_finished

# Workers that wait for a dead one cannot save any more: between SIGTERM and SIGKILL there is nothing to wait for.
_TO_END_S = 5
_TO_HEAR_THE_CAUSE_S = 3.0


class Agent(LocalElasticAgent):
    """The workers of this machine, among those of the others.

    Args:
        grace_s: how long workers that are asked to stop may take to save.
        host: what this machine is called in messages.
        newest_step: how far the run has come, as far as can be seen from here; None where it cannot be seen.
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
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec=spec, logs_specs=logs_specs)
        self.cause: Cause | None = None
        self._grace_s, self._host, self._newest_step, self._say = grace_s, host, newest_step, say
        self._failed_at: int | None = None

    def bulletin(self) -> Bulletin | None:
        """The bulletin of the round of rendezvous under way, if there was one."""
        group = self._worker_group
        if group.store is None:
            return None
        return Bulletin(group.store, group.group_rank or 0, group.group_world_size or 1)

    def exit_codes(self) -> list[int | None]:
        """Those of the workers, by local rank; None for one that runs."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [handler.proc.poll() for _, handler in sorted(handlers.items())]

    def stop_workers(self) -> None:
        """Ask the workers to save and stop, and wait until they have, or until the time for that is over."""
        super()._shutdown(signal.SIGTERM, self._grace_s)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _TO_END_S) -> None:
        super()._shutdown(signal.SIGTERM, _TO_END_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
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
                return left_early(worker_group.workers[local_rank].global_rank, self._host)
        return None

    def _give_up_where_it_stands_still(self) -> None:
        """Starting again does not help a job that has come no further since the failure before."""
        assert self.cause is not None
        before, now = self._failed_at, self._newest_step()
        self._failed_at = now
        if before is not None and before == now and self._remaining_restarts > 0:
            self._say(f"it failed again, and no step was made since the restart (step {now}): giving up")
            self._remaining_restarts = 0

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state is WorkerState.HEALTHY:  # a node waits to join: a new one, or one whose workers failed
            bulletin = self.bulletin()
            elsewhere = bulletin.first() if bulletin is not None else None
            why = f"{elsewhere.message}. " if elsewhere is not None else "another node has come or gone. "
            self._say(f"{why}The workers of all nodes start again, from the newest checkpoint")
        else:
            most = worker_group.spec.max_restarts
            why = f"{self.cause.message}. " if self.cause is not None else ""
            self._say(f"{why}Restart {most - self._remaining_restarts} of {most}, from the newest checkpoint")
        super()._restart_workers(worker_group)


def job_code(codes: list[int | None]) -> int:
    """What the exit codes of workers that were asked to stop make of the job."""
    saved = all(code in (ExitCode.DONE, ExitCode.STOPPED, -signal.SIGTERM) for code in codes)
    return ExitCode.STOPPED if saved else ExitCode.FAILURE
