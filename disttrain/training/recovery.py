"""A lost worker, without a restart: the survivors agree on the last step, share its state, and continue.

See docs/recovery.md. Whatever is in doubt raises the error that the loss caused, which ends in a restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from disttrain.distributed.collectives import gather_objects, interruptible
from disttrain.distributed.meeting import MissingRanks
from disttrain.distributed.regroup import let_go, rejoin
from disttrain.distributed.report import report_ready
from disttrain.distributed.verdicts import Verdict, Verdicts
from disttrain.distributed.world import World
from disttrain.errors import DisttrainError, is_lost_peer
from disttrain.faultpoints import reached
from disttrain.health.watchdog import Watchdog
from disttrain.parallel.exact.strategy import Exact
from disttrain.training.audit import Corruption
from disttrain.training.job import Job
from disttrain.training.monitor import RunMonitor
from disttrain.training.optim import set_learning_rates
from disttrain.training.recoverable import continues_after_losses
from disttrain.training.shared_state import Sent, share_state
from disttrain.training.sources import sources_of
from disttrain.training.succession import Succession

_TO_HEAR_S = 3.0  # the launcher notices at once when a worker dies
_TO_HEAR_AGAIN_S = 30.0
_LOOK_EVERY_S = 0.05  # for newcomers: a look at the pipe takes as long as all else that a step does to be recoverable
_TOO_LATE = "the run ended before this worker could join it."
_log = logging.getLogger("disttrain")


class _AnotherGroup(RuntimeError):
    """The launcher has given a verdict."""


class Recovery:
    """Keeps what an unfinished step must be put back to, and leads this rank through a loss."""

    def __init__(self, job: Job, monitor: RunMonitor, succession: Succession, watchdog: Watchdog | None) -> None:
        self._job, self._monitor, self._succession, self._watchdog = job, monitor, succession, watchdog
        self._verdicts = Verdicts.of_this_process() if continues_after_losses(job) else None
        self._sources = sources_of(job.recipe) if self._verdicts is not None else {}
        self._generation, self._is_ready = 0, False
        self._left_at, self._sent = time.monotonic(), Sent()
        self._look_at = 0.0
        self._is_new = False  # among workers that have a state to hand out
        self._unreported: list[Verdict] = []
        self._accused: list[int] = []  # of holding up the others, as reported last
        self._hung_at: tuple[int, int] | None = None  # the generation in which one did, and the step
        self._kept: tuple[int, list[float] | None, dict[str, int]] | None = None
        monitor.saver.is_passed_on = self._verdicts is not None and succession.is_possible
        if watchdog is not None and self._verdicts is not None:
            watchdog.cure = self._report_hung

    def _report_hung(self, ranks: Sequence[int]) -> bool:
        """Have the launcher kill the ranks that hold up the others; on the watchdog's thread, while it watches."""
        if not self._is_ready or (0 in ranks and not self._succession.is_possible):
            return False
        if ranks and self._hung_at is not None:
            generation, step = self._hung_at
            if step == self._job.step and generation != self._generation:
                return False  # others hang where one was killed for it: so might all, one after the other
        if ranks:
            self._hung_at = self._generation, self._job.step
        accused = [0] if 0 in ranks else list(ranks)  # as it serves the store, nothing is known of others without it
        if accused != self._accused:
            self._accused = accused
            self._declare(hung=accused)
        return True

    def _declare(
        self,
        *,
        is_ready: bool = True,
        is_through: bool = False,
        failed: bool = False,
        hung: Sequence[int] = (),
        corrupt: Sequence[int] = (),
    ) -> None:
        report_ready(
            is_ready=is_ready,
            is_through=is_through,
            can_lead=is_ready and self._succession.is_possible and not self._is_new,
            joins=self._is_new,  # until it has the state
            generation=self._generation,
            failed=failed,
            hung=hung,
            corrupt=corrupt,
            sources=self._sources,
        )

    def before_step(self) -> None:
        """Note where the step begins."""
        if self._verdicts is not None:
            assert isinstance(self._job.strategy, Exact)
            self._kept = (self._job.step, self._job.strategy.expected, self._job.non_finite.state())

    def after_step(self) -> None:
        """The step is made, and what belongs to it is done: from now on, a loss can be continued."""
        self._kept = None
        if self._verdicts is None:
            return
        if not self._is_ready:
            self._is_ready = True
            self._declare()
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + _LOOK_EVERY_S
            if self._verdicts.have_come():
                raise _AnotherGroup

    def over(self) -> None:
        """All steps are made: from now on a loss ends in a restart, and nobody can join."""
        self._stand_down(is_through=True)

    def _stand_down(self, *, is_through: bool = False) -> None:
        if self._is_ready:
            self._is_ready = False
            self._declare(is_ready=False, is_through=is_through)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Have no collective in the block wait on after a loss."""
        verdicts, job = self._verdicts, self._job
        if verdicts is None:
            yield
            return
        with interruptible(lambda: job.world.group_is_broken or verdicts.say_that_one_is_lost()):
            yield

    def survive(self, error: RuntimeError | Corruption) -> None:
        """Continue without the worker whose loss caused `error`, or raise it. Every survivor must call it.

        Another loss meanwhile has all begin again: until the end, nothing is changed that a second time would spoil.
        """
        failure: RuntimeError | Corruption | None = error
        self._left_at, self._sent = time.monotonic(), Sent()
        try:
            while failure is not None:
                if self._verdicts is None or not self._is_ready or not self._can_continue_after(failure):
                    raise failure
                if isinstance(failure, Corruption):
                    self._monitor.console.warn(str(failure))
                self._job.world.leave_group()  # first of all: the others may wait for this rank
                let_go(failure)
                if self._watchdog is not None:
                    self._watchdog.pause()
                hung = failure.ranks if isinstance(failure, MissingRanks) else []
                corrupt = failure.ranks if isinstance(failure, Corruption) else []
                verdict = None if hung or corrupt else self._next_verdict(self._verdicts, _TO_HEAR_S)
                if verdict is None:  # no worker has died
                    self._declare(failed=not hung and not corrupt, hung=hung, corrupt=corrupt)
                    verdict = self._next_verdict(self._verdicts, _TO_HEAR_AGAIN_S)
                if verdict is None or verdict.rank is None:
                    if self._is_new:
                        _log.info(_TOO_LATE)
                    raise failure
                failure = self._continue(verdict, self._verdicts)
        finally:  # an error whose own frames hold it would keep the process group, for which the other ranks wait
            del error, failure

    def _can_continue_after(self, error: RuntimeError | Corruption) -> bool:
        if isinstance(error, Corruption):
            return bool(error.ranks) and (0 not in error.ranks or self._succession.is_possible)
        return isinstance(error, _AnotherGroup) or is_lost_peer(error)

    def join(self) -> None:
        """Wait for a place among the workers of a run under way, and take it, with their state."""
        if self._verdicts is None:
            raise DisttrainError("a worker cannot join this run while it is under way.")
        report_ready(is_ready=True, joins=True, sources=self._sources)
        self._job.progress.at("waiting to join the other workers", self._job.step, patient=True)
        verdict = self._next_verdict(self._verdicts, None)
        if verdict is None or verdict.rank is None:
            _log.info(_TOO_LATE)
            raise DisttrainError(_TOO_LATE)
        self._is_new = self._is_ready = True
        if self._watchdog is not None:
            self._watchdog.pause()
        failure = self._continue(verdict, self._verdicts)
        if failure is not None:
            self.survive(failure)

    def _next_verdict(self, verdicts: Verdicts, timeout_s: float | None) -> Verdict | None:
        """The latest; None if none has come in time."""
        verdict = verdicts.wait(timeout_s)
        latest = None
        while verdict is not None:
            self._unreported.append(verdict)
            latest, verdict = verdict, verdicts.wait(0.0)
        return latest

    def _continue(self, verdict: Verdict, verdicts: Verdicts) -> RuntimeError | None:
        """Return the error by which another loss shows."""
        job = self._job
        assert verdict.rank is not None
        self._generation = verdict.generation
        job.progress.at("forming a new group of workers", job.step)
        self._monitor.saver.finish_copy()  # before the weights change
        # Groups that broke although no worker had died.
        num_failed = sum(not one.lost_ranks and not one.num_new for one in self._unreported)
        try:
            with self.interrupting():
                self._undo(rejoin(job.world, verdict, verdicts.have_come, num_failed))
                reached("recovery: joined", step=job.step)
                if self._watchdog is not None:
                    self._watchdog.resume(job.world)
                steps_of = self._agree()
                reached("recovery: agreed", step=job.step)
                self._succession.settle()
                self._monitor.make_up()
                for loss in self._unreported:
                    self._report(loss, steps_of)
        except RuntimeError as error:
            _log.info("generation %d broke: %s", verdict.generation, error)
            return error
        except DisttrainError:
            self._stand_down()  # it is not to be waited for
            raise
        was_new, self._is_new = self._is_new, False
        if was_new:
            self._declare()
        self._unreported, self._accused = [], []
        return None

    def _report(self, loss: Verdict, stood_at: Sequence[int]) -> None:
        """Say and journal who was lost or came; `stood_at` are the steps that the survivors had made."""
        job, monitor = self._job, self._monitor
        step, world_size, seconds = job.step, job.world.size, round(time.time() - loss.time, 3)
        workers = f"{world_size} worker{'s' if world_size > 1 else ''}"
        if loss.num_new:
            monitor.tracker.event(
                "worker-joined",
                step=step,
                joined=loss.num_new,
                joined_ranks=list(loss.new_ranks),
                noticed=loss.time,
                seconds=seconds,
                held_seconds=round(time.monotonic() - self._left_at, 3),  # from the first step that this rank put off
                sending_seconds=round(self._sent.seconds, 3),
                sent_bytes=self._sent.num_bytes,
                world_size=world_size,
            )
            monitor.console.line(f"continuing with {workers} from step {step}: {loss.num_new} joined")
        if not loss.lost:
            return
        monitor.tracker.event(
            "worker-lost",
            step=step,
            what=loss.lost,
            lost_ranks=list(loss.lost_ranks),
            noticed=loss.time,
            seconds=seconds,
            survivors_at=stood_at,
            slices_recomputed=job.strategy.num_slices if min(stood_at) == max(stood_at) else 0,
            world_size=world_size,
        )
        monitor.console.line(f"{loss.lost}: continuing with {workers} from step {step} after {seconds:.1f} s")

    def _undo(self, world: World) -> None:
        """Take the new place, at the end of the last step that this rank has made."""
        job, strategy = self._job, self._job.strategy
        assert isinstance(strategy, Exact)
        expected = strategy.expected
        if self._kept is not None and self._kept[0] == job.step:
            _, expected, non_finite = self._kept
            job.non_finite.undo_step(non_finite)
        self._kept = None
        job.optimizer.zero_grad(set_to_none=True)
        set_learning_rates(job.optimizer, job.schedule, job.step - 1)
        job.world = world
        strategy.rejoin(world, expected)
        job.loader.deal(world.rank, world.size, strategy.slices)
        job.eval_loader.deal(world.rank, world.size)

    def _agree(self) -> list[int]:
        """Bring those that are a step behind to where the others are; return where each rank was."""
        job = self._job
        stand = gather_objects((None if self._is_new else job.step, job.progress.place))
        places: list[int | None] = [step for step, _ in stand]
        steps = [step for step in places if step is not None]  # newcomers have none
        if not steps:
            raise DisttrainError("all workers that had the state of the run are lost.")
        newest = max(steps)
        job.progress.place = max(place for _, place in stand)  # the stages entered are counted anew from here
        if newest - min(steps) > 1:  # a collective needs every rank
            raise DisttrainError(f"the workers that survived a loss stand at steps {steps}, more than one apart.")
        if any(step != newest for step in places):
            is_behind = self._is_new or job.step < newest
            self._sent = share_state(job, self._monitor, places.index(newest), is_behind=is_behind)
        _log.info("continuing at step %d with %d workers; they stood at %s", job.step, job.world.size, places)
        return steps
