"""The checkpoints of a running job: saved beside the training, reported, and waited for where a run needs one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, Outcome
from disttrain.checkpoint.reach import sharded_store
from disttrain.checkpoint.tensors import Tensors
from disttrain.distributed.collectives import broadcast_from_main, max_
from disttrain.distributed.joint_failure import all_fail
from disttrain.distributed.sharded import gathered, local
from disttrain.errors import AgreedError, ConfigurationError, DisttrainError, is_circumstance
from disttrain.health.finite import is_finite
from disttrain.layout import RECIPE, metrics_of, step_of
from disttrain.recipe.address import is_url
from disttrain.remote import Brought
from disttrain.runs.rundir import resume_command, store_recipe
from disttrain.terminal.console import Console
from disttrain.tracking import Tracker
from disttrain.training.apart import gathered_apart
from disttrain.training.contents import contents_of
from disttrain.training.job import Job

_WORTH_A_WORD_S = 0.5
_MOST_UNREPORTED = 3
_PATIENCE_S = 60.0  # how long a URL that cannot be reached is retried while it lacks the newest checkpoint
_RETRY_S = 5.0


class Saver:
    """Has rank 0 save, or of shards each rank its own. Every rank must call each method, at the same step."""

    def __init__(
        self,
        job: Job,
        run_dir: Path,
        address: str,
        store: CheckpointStore,
        tracker: Tracker,
        console: Console,
    ) -> None:
        """`address` is where the run lives: the folder, or a URL."""
        self.address = address
        self.last_save = time.monotonic()
        """When a checkpoint was last begun, by time.monotonic()."""
        self._job, self._run_dir, self._store = job, run_dir, store
        is_sharded, self._is_apart = job.strategy.is_sharded, job.strategy.trains_apart
        elsewhere = Brought(address, store) if is_sharded and is_url(address) else None
        patience_s = job.recipe.train.hang_timeout_s
        self._shards = sharded_store(store, job.world, patience_s, elsewhere) if is_sharded else None
        # What is gathered from all workers is a copy already.
        is_copy = (is_sharded and self._shards is None) or self._is_apart
        self._writer = CheckpointWriter(self._shards or store, None if is_copy else job.optimizer)
        self._tracker, self._console = tracker, console
        self._first_step = job.step
        self.saved = [(job.step, bool(job.metrics))]
        """Of the checkpoints that were begun last, step and whether it has an evaluation: on every rank."""
        self.is_passed_on = False
        """Whether rank 1 keeps a copy of what is saved, so that it can write it if rank 0 dies meanwhile."""
        self._has_waited = False

    def save(self, instead: Mapping[str, Any] | None = None) -> None:
        """Save beside the training; a save that fails is a warning. `instead`: what parts of the state are to be."""
        job = self._job
        self.last_save, instead = time.monotonic(), instead or {}
        self.saved = [*self.saved[-_MOST_UNREPORTED:], (job.step, bool(instead.get("metrics", job.metrics)))]
        if self._is_apart:
            self._save_apart(instead)
            return
        writes = job.world.is_main or (self.is_passed_on and job.world.rank == 1)
        if not writes and not job.strategy.is_sharded:
            return
        model: Tensors
        optimizer: Tensors
        if writes:
            model, optimizer, state = contents_of(job)
        else:  # what only rank 0 has to have, such as the state of hooks, is not looked at
            model, optimizer, state = job.model_tensors(), job.optimizer_tensors()[0], {}
        if self._shards is not None:
            model, optimizer = self._shards.mine(model, optimizer)
        elif job.strategy.is_sharded:
            model, optimizer = gathered(job.world, model), gathered(job.world, optimizer)
        if writes:
            self._writer.find = None if job.world.is_main else self._store.find
            self._report(self._writer.save(model, optimizer, {**state, **instead}))
        elif self._shards is not None:
            self._writer.save(model, optimizer, {"step": job.step})  # rank 0 reports it

    def _save_apart(self, instead: Mapping[str, Any]) -> None:
        """Save the run's model, and what each worker has of its own."""
        optimizer, own = gathered_apart(self._job)
        with self._job.strategy.averaged():
            if self._job.world.is_main:
                model, _, state = contents_of(self._job)
                self._report(self._writer.save(model, optimizer, {**state, **own, **instead}))

    def save_unless_saved(self) -> None:
        """Save, but for a step that is saved, or will be with its evaluation."""
        if self.saved[-1][0] != self._job.step and not self._job.evaluation_is_due:
            self.save()

    def save_unless_spoilt(self) -> None:
        """Save where the job stands, and wait, unless it is saved or has a number that is not finite."""
        job = self._job
        self.finish()
        if self._is_apart:  # the others have made steps since that a worker which failed has not
            return
        newest = broadcast_from_main(job.world, self.newest_step)
        is_finite_here = is_finite(local(tensor) for tensor in job.model_tensors().values())
        if (newest is None or newest < job.step) and not max_(torch.tensor(0.0 if is_finite_here else 1.0)):
            self.save()
            self.finish()

    def save_or_fail(self, instead: Mapping[str, Any] | None = None) -> None:
        """As `save`, and wait until the checkpoint is where the run lives. Raises AgreedError if it cannot be."""
        job, deadline = self._job, time.monotonic() + _PATIENCE_S
        with job.progress.patiently("saving"):
            while not self._is_saved_now(instead):
                remedy = f"make room on the disk of {self._run_dir}"
                if self._shards is not None and self._shards.needs_elsewhere:
                    if broadcast_from_main(job.world, lambda: time.monotonic() < deadline):
                        time.sleep(_RETRY_S)
                        continue
                    remedy = f"see to it that every machine can write to {self.address}"
                raise AgreedError(
                    f"the checkpoint of step {job.step} could not be saved: {remedy}, and resume with: "
                    f"{resume_command(self.address)}"
                )
        self.settle(_PATIENCE_S)

    def _is_saved_now(self, instead: Mapping[str, Any] | None) -> bool:
        self.save(instead)
        self.finish_copy()  # else rank 0 would wait for what the others have not begun to write
        saved = broadcast_from_main(self._job.world, self.finish)
        self.finish()
        return saved

    def save_unless_there(self) -> None:
        """As `save_or_fail`, unless the checkpoint is there already, with the evaluation that was made."""

        def is_there() -> bool:
            self.finish()
            return self._store.find({"step": self._job.step, "metrics": self._job.metrics}) is not None

        with self._job.progress.patiently("saving"):
            found = broadcast_from_main(self._job.world, is_there)
        if found:
            self.settle(_PATIENCE_S)
        else:
            self.save_or_fail()

    @contextmanager
    def saving_if_it_fails(self) -> Iterator[None]:
        """Around what every rank does alike with an evaluation: if it fails, what was trained until then is saved.

        A start with the mistake mended then resumes with this evaluation, as if it had not been made. If only some
        ranks fail, no collective is begun: rank 0, if it is one of them and has all the weights, saves by itself.
        """
        job = self._job
        hooks = job.hooks.state() if job.world.is_main else {}  # the others' need not have any
        before = {"best_evaluation": job.early_stopping.state(), "hooks": hooks}
        try:
            yield
        except Exception as error:
            if is_circumstance(error):
                raise
            instead = {**before, "metrics": {}, "finished": False}
            try:
                if all_fail(f"evaluation-{job.step}"):
                    self.save_or_fail(instead)
                elif job.world.is_main and not job.strategy.is_sharded and not self._is_apart:
                    self.save(instead)
                    self.finish()
                else:
                    raise
            except DisttrainError as second:
                if second is not error:  # what failed first is the cause
                    self._console.warn(str(second))
                raise error from error.__cause__
            self._console.warn(
                f"the evaluation at step {job.step} failed, and a checkpoint of what was trained is saved. Mend what "
                f"failed, and resume with: {resume_command(self.address)}"
            )
            raise

    def settle(self, patience_s: float) -> None:
        """Wait until the checkpoints are where the run lives. Raises DisttrainError, on every rank, if they cannot be.

        All ranks are updated every few seconds, so that none takes the others for dead.
        """
        arrival = self._store.settle(patience_s)
        while not broadcast_from_main(self._job.world, lambda: next(arrival)):
            pass

    def take_over(self, saved: Sequence[tuple[int, bool]], guard: Callable[[], object]) -> None:
        """Be the one who writes from now on; write what rank 0 has begun to save and was lost with it.

        `saved` is what was begun last, as the ranks that were there have it in `Saver.saved`: while the last is begun,
        the one before may not be written yet. What neither the disk nor this worker has is replaced by a checkpoint of
        now. `guard`: as a `CheckpointStore` has it. Raises DisttrainError if that cannot take its place.
        """
        self._store.guard = guard
        self._store.clear_unfinished()
        kept = self._writer.kept
        for step, is_evaluated in saved:  # rank 0 may have died before it reported them
            path = self._store.find({"step": step, "metrics": is_evaluated})
            if path is not None and step > self._first_step:
                self._report(Outcome(step, path))
        for outcome in self._writer.take_over():
            self._report(outcome)
        paths = self._store.paths()
        newest = (step_of(paths[-1]), bool(metrics_of(paths[-1]))) if paths else (0, False)
        lost = [one for one in saved[-2:] if one > newest and one not in kept]
        if any(is_evaluated and step != self._job.step for step, is_evaluated in lost):  # it may have been the best
            raise DisttrainError(f"the checkpoint of step {lost[0][0]} was lost with the worker that wrote it.")
        if lost and not self._job.evaluation_is_due:  # which is saved in a moment
            self.save()

    def finish_copy(self) -> None:
        """Wait until what is being saved is copied: to be called before the weights change."""
        self._writer.finish_copy()

    def poll(self) -> None:
        """Report what became of the checkpoint under way, if it is done."""
        self._report(self._writer.poll())

    def finish(self) -> bool:
        """Wait for the checkpoint under way; whether there was one and it is there."""
        return self._report(self._writer.wait())

    def close(self) -> None:
        """Finish the checkpoint that is being written."""
        if self._shards is not None:
            self._shards.close()
        self.finish()
        self._writer.close()

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        paths = self._store.paths()
        return step_of(paths[-1]) if paths else None

    def words(self) -> str:
        """Which checkpoint is the newest, in words."""
        paths = self._store.paths()
        return f"The newest checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."

    def _report(self, outcome: Outcome | None) -> bool:
        """Report what became of a checkpoint, if anything did; return whether it is there.

        A save that fails is a warning: the previous checkpoint stands, and training continues.
        """
        if outcome is None or not self._job.world.is_main:
            return False
        if outcome.path is None:
            self._console.warn(f"step {outcome.step} could not be saved: {outcome.error}. {self.words()}")
            self._tracker.event("checkpoint-failed", step=outcome.step, error=str(outcome.error))
            return False
        if not (self._run_dir / RECIPE).exists():
            self._restore_run_dir()
        self._warn_of_waiting(outcome)
        path, waited_s = str(outcome.path.relative_to(self._run_dir)), round(outcome.waited_s, 3)
        self._tracker.event("checkpoint", step=outcome.step, path=path, waited_s=waited_s)
        return True

    def _restore_run_dir(self) -> None:
        """The folder was moved or deleted: the save has recreated it, and this restores what makes it a run."""
        self._tracker.restore()
        try:
            store_recipe(self._run_dir, self._job.recipe)
        except ConfigurationError as error:
            self._console.warn(f"{self._run_dir} was moved or deleted under the job: {error}")
            return
        self._console.warn(
            f"{self._run_dir} was moved or deleted under the job. It is there again, with recipe, journal and the "
            "checkpoint just saved; what else was in it is gone, or in the place that it was moved to."
        )

    def _warn_of_waiting(self, outcome: Outcome) -> None:
        if outcome.waited_s > _WORTH_A_WORD_S and not self._has_waited:
            self._has_waited = True
            self._console.warn(
                f"step {outcome.step} waited {outcome.waited_s:.1f} s for the previous checkpoint to be written: save "
                "less often (checkpoint.every_steps, checkpoint.every_seconds), or to a faster disk. The journal has "
                "each wait."
            )
