"""The evaluations of a running job: made by all ranks, recorded, and saved with the weights that they measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain.distributed.collectives import gather_objects
from disttrain.errors import ConfigurationError
from disttrain.layout import EVAL, EVALUATION
from disttrain.runs.rundir import write_evaluation
from disttrain.task import named
from disttrain.terminal.console import Console
from disttrain.tracking import Tracker
from disttrain.training.conclusion import prepare_conclusion
from disttrain.training.evaluate import Evaluation, concluded, scored
from disttrain.training.hooks import HookContext
from disttrain.training.job import Job
from disttrain.training.saver import Saver


class Evaluations:
    """Evaluates a job where it stands. Every rank must call each method, at the same step; rank 0 writes."""

    def __init__(self, job: Job, run_dir: Path, saver: Saver, tracker: Tracker, console: Console) -> None:
        self._job, self._run_dir, self._saver = job, run_dir, saver
        self._tracker, self._console = tracker, console
        self._newest: dict[str, Any] | None = None  # what evaluation.json is to hold
        self._has_warned = False  # that it cannot be written

    def evaluate(self, pace: str, context: Callable[[], HookContext]) -> None:
        """Evaluate, save a checkpoint that holds the result, and report it, with the epoch's `pace` in words.

        `context` gives what the hooks see. Kept, it would make a cycle, by which a failed run would keep its process
        group, for which the other ranks wait.
        """
        self._record(*self._measured(), pace, context)
        (self._saver.save_or_fail if self._job.is_finished else self._saver.save)()
        prepare_conclusion(self._job, self._tracker, self._console)

    def make_up(self, pace: str, context: Callable[[], HookContext]) -> None:
        """After the loss of a worker: if some ranks have recorded an evaluation of this step, have the others do so."""
        job = self._job
        recorded = gather_objects(job.metrics is not None)
        if not any(recorded):
            return
        if not all(recorded):
            measured = self._measured()  # those who have it take part for the others' sake
            if job.metrics is None:
                self._record(*measured, pace, context)
                if not job.is_finished:
                    self._saver.save()
        if job.is_finished:
            self._saver.save_unless_there()

    def _measured(self) -> tuple[Evaluation, str]:
        """The evaluation, and its headline."""
        job = self._job
        job.strategy.share_buffers_()
        compiles = job.compiles_in("evaluating", [job.recipe.train.eval_batch_size])
        job.progress.at("evaluating", job.step, patient=compiles)
        self._saver.finish_copy()
        with job.as_evaluated():
            at, tick, score = f" at step {job.step}", self._evaluated_some, job.strategy.score
            loader = job.eval_loader
            sums = scored(job.model, job.task, loader, autocast=job.autocast, on_batch=tick, at=at, compute=score)
        with self._saver.saving_if_it_fails():
            result = concluded(job.task, loader, sums)
            with named(job.task, "headline"):
                return result, job.task.headline(result.metrics, result.details)

    def _record(self, result: Evaluation, headline: str, pace: str, context: Callable[[], HookContext]) -> None:
        """No other rank is needed for it, unless the run ends with it."""
        job = self._job
        job.metrics = {f"{EVAL}{name}": value for name, value in result.metrics.items()}
        self._tracker.metrics(job.step, job.metrics)
        counts = {key: result.details[key] for key in ("correct", "total") if key in result.details}
        self._tracker.event("evaluated", step=job.step, **counts)
        self._write(result)
        where = f"step {job.step}" if job.step % job.steps_per_epoch else f"epoch {job.epoch}/{job.num_epochs}"
        self._console.line(f"{where}: {headline}{pace}")
        self._refuse_unknown_best(result)
        with self._saver.saving_if_it_fails():
            self._observe(result, context)

    def _observe(self, result: Evaluation, context: Callable[[], HookContext]) -> None:
        """Have early stopping and the hooks see an evaluation."""
        job = self._job
        if job.is_at_evaluation:  # another one, where the run ends for now, would not be there if it went further
            job.early_stopping.observe(job.step, result.metrics)
        if job.early_stopping.has_stopped and job.step < job.total_steps:
            self._console.line(f"stopping early: {job.early_stopping.words()}")
            self._tracker.event("stopped-early", step=job.step, best=job.early_stopping.state())
        if job.hooks:
            job.hooks.after_evaluation(context())

    def _refuse_unknown_best(self, result: Evaluation) -> None:
        """A metric that no evaluation has would silently keep nothing as best."""
        job, recipe = self._job, self._job.recipe
        is_needed = recipe.checkpoint.best is not None or recipe.checkpoint.keep_best > 0 or recipe.train.patience > 0
        if job.best.metric in result.metrics or not is_needed:
            return
        self._saver.save_or_fail()
        raise ConfigurationError(
            f"checkpoint.best = '{job.best}': the evaluation has no metric of that name; set it to one that it has: "
            f"{', '.join(result.metrics)}. The checkpoint is saved, and the same --run-dir resumes."
        )

    def _evaluated_some(self) -> None:
        self._job.progress.tick()
        self._console.busy(f"step {self._job.step} of {self._job.total_steps}: evaluating")

    def _write(self, result: Evaluation) -> None:
        self._newest = {"step": self._job.step, "epoch": self._job.epoch, **result.to_json()}
        if self._job.world.is_main:
            self.write_newest()

    def write_newest(self) -> None:
        """Write the newest evaluation, if this worker has taken part in one, to evaluation.json."""
        if self._newest is None:
            return
        try:
            write_evaluation(self._run_dir, self._newest)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._console.warn(f"{self._run_dir / EVALUATION} could not be written: {error}")
