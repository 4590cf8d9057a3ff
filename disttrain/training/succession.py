"""When rank 0 dies: what it did alone for the run, and the worker that takes its place.

Rank 0 owns the run directory, writes checkpoints, keeps the journal, feeds MLflow, measures the machine, looks for a
request to stop, and talks to the user. All of that is continued from the run directory, as a start that resumes does,
and from what each worker has in memory: what it would have written itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from disttrain.distributed.collectives import broadcast_object, gather_objects
from disttrain.errors import ConfigurationError, DisttrainError
from disttrain.faultpoints import reached
from disttrain.health.stop import stop_file
from disttrain.layout import STOP
from disttrain.recipe.address import is_url
from disttrain.runs.fence import Fence
from disttrain.runs.lock import owned, owner_of, patience_across_machines_s, this_owner
from disttrain.tracking import SystemSampler
from disttrain.training.conclusion import concluding
from disttrain.training.machine_report import MachineReport
from disttrain.training.monitor import RunMonitor
from disttrain.training.session import end_at_once

_TO_BE_FREE_S = 2.0  # the system frees the lock of a process that ends


def _unguarded() -> None:
    """On one machine a process that stood still is killed before its place is given away."""


class Succession:
    """Lets this worker take the place of rank 0; `leads`: it is rank 0, from the start."""

    def __init__(self, monitor: RunMonitor, *, leads: bool) -> None:
        self._monitor, self._leads, self._started = monitor, leads, time.monotonic()
        self.is_possible = self._reaches_the_run()
        """Not behind a URL: there is more to own than a folder, and the run restarts."""

    def _reaches_the_run(self) -> bool:
        """Whether this worker could write where rank 0 does. Every rank must call it."""
        monitor, world = self._monitor, self._monitor.job.world
        if is_url(monitor.saver.address):
            return False
        if world.slot is None:
            return True
        owner = broadcast_object(this_owner() if world.is_main else None, 0)
        # Another machine may have another folder of this name. The owner must not look: it would lose the lock.
        return world.is_main or owner_of(monitor.run_dir) == owner

    def settle(self) -> None:
        """Have the worker that is rank 0 by now do what rank 0 does, if it does not yet.

        Every rank must call it. Raises DisttrainError if it cannot.
        """
        saved = max(gather_objects(self._monitor.saver.saved), key=lambda of_rank: of_rank[-1])
        world = self._monitor.job.world
        if world.is_main and not self._leads:
            try:
                self._take_over(saved)
            except (ConfigurationError, OSError) as error:
                raise DisttrainError(f"rank 0 was lost, and this worker cannot take its place: {error}") from error
            self._leads = True
        if world.slot is not None:
            self.is_possible = self._reaches_the_run()
            self._monitor.saver.is_passed_on = self.is_possible
            if world.is_local_main:
                self._sample()

    def _take_over(self, saved: Sequence[tuple[int, bool]]) -> None:
        monitor, enter = self._monitor, self._monitor.until_the_end.enter_context
        job, run_dir, console, tracker = monitor.job, monitor.run_dir, monitor.console, monitor.tracker
        console.take_over()  # whoever spoke before is dead, or on a machine that is cut off
        enter(owned(run_dir, self._to_be_free_s(), console.warn))  # which it cannot as long as the other lives
        reached("succession: owner", step=job.step)
        self._sample()
        guard = _unguarded if job.world.slot is None else Fence(run_dir, end_at_once).check
        tracker.take_over(job.step, guard)
        enter(concluding(job, run_dir, monitor.saver.address, console, monitor.stop, tracker, self._started))
        monitor.saver.take_over(saved, guard)
        monitor.evaluations.write_newest()
        reached("succession: journal", step=job.step)
        enter(stop_file(run_dir / STOP, monitor.stop, console.line, is_new=False))

    def _to_be_free_s(self) -> float:
        job = self._monitor.job
        if job.world.slot is None:
            return _TO_BE_FREE_S
        return patience_across_machines_s(job.recipe.train.hang_timeout_s)

    def _sample(self) -> None:
        """Measure this machine, if nobody does."""
        monitor, job = self._monitor, self._monitor.job
        if job.recipe.tracking.system_metrics and not monitor.machines.samples:
            sampler = monitor.until_the_end.enter_context(SystemSampler())
            monitor.machines = MachineReport(job.world, job.recipe, sampler)
