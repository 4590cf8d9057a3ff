"""What happens between steps: metrics, checkpoints, requests to stop; each decision agreed by all ranks at one step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, Outcome
from disttrain.checkpoint.store import step_of
from disttrain.collectives import Agreement, decided_by_main, sum_
from disttrain.console import Console
from disttrain.diagnosis import listed
from disttrain.errors import AgreedError, ConfigurationError, DivergedError, StoppedError
from disttrain.evaluate import Evaluation, evaluate
from disttrain.finite import Incident, is_finite
from disttrain.guard import StopRequest
from disttrain.job import Job
from disttrain.rundir import EVALUATION, RECIPE, go_on_with, store_recipe, write_evaluation
from disttrain.tracking import SYSTEM_METRICS, NullTracker, SystemSampler, Tracker, node_metrics

_WORTH_A_WORD_S = 0.5
_PATIENCE_S = 60.0  # how long a URL that cannot be reached is tried again, with the newest checkpoint not there yet


class Bookkeeper:
    """Keeps a job's journal, checkpoints and console. Rank 0 writes; all ranks know."""

    def __init__(
        self,
        job: Job,
        run_dir: Path,
        store: CheckpointStore,
        tracker: Tracker | NullTracker,
        console: Console,
        stop: StopRequest,
        sampler: SystemSampler | None,
        address: str,
    ) -> None:
        self.job = job
        self.run_dir = run_dir
        self._address = address  # where the run lives: the folder, or a URL
        self._store = store
        self._writer = CheckpointWriter(store, job.optimizer)
        self._tracker = tracker
        self._console = console
        self._stop = stop
        self._agreement = Agreement(num_flags=2)
        self._sampler = sampler
        self._last_save = self._last_log = time.monotonic()
        self._saved_step = job.step
        self._has_waited = False
        self._samples_since_log = 0
        self._pace = ""

    def after_step(self, losses: torch.Tensor, global_size: int) -> None:
        """Log, save or stop as due after the step just made.

        `losses`, (num_shards,), are each shard's share of its mean loss, zero for the shards of other workers.

        Every rank must call it. Raises StoppedError once all ranks have agreed to stop and the checkpoint is saved.
        """
        job, recipe = self.job, self.job.recipe
        self._samples_since_log += global_size
        # On a GPU a look at the loss waits for the step, so it is looked at only when it is logged.
        if job.step % recipe.train.log_every_steps == 0:
            self._log(losses)
        incident = job.finite.take_incident()
        if incident is not None:
            self._tell_of(incident)
        self._report(self._writer.poll())
        seconds = recipe.checkpoint.every_seconds
        time_is_up = job.world.is_main and 0 < seconds <= time.monotonic() - self._last_save
        self._act(self._agreement.ask(self._stop.received is not None, time_is_up))

    def _act(self, answer: list[bool]) -> None:
        every = self.job.recipe.checkpoint.every_steps
        due = every > 0 and self.job.step % every == 0
        if due or any(answer):
            # What was asked at this very step must be known before anything is written.
            answer = [early or late for early, late in zip(answer, self._agreement.finish(), strict=True)]
        stop, time_is_up = answer
        if stop:
            self._save_or_fail()
            raise StoppedError(
                f"stopped on request ({self._stop.received or 'another worker'}) after step {self.job.step} of "
                f"{self.job.total_steps}; the checkpoint is saved. Go on with: {go_on_with(self._address)}"
            )
        if due or time_is_up:
            self._save_unless_saved()

    def _tell_of(self, incident: Incident) -> None:
        """Journal a step that was not finite; warn of the first, the second, the fourth, the eighth and so on."""
        step, fields = self.job.step, asdict(incident)
        self._tracker.event("non-finite", step=step, epoch=1 + (step - 1) // self.job.steps_per_epoch, **fields)
        if incident.total.bit_count() == 1:
            where = f" on rank {incident.rank}, in {listed(incident.samples)}" if incident.rank is not None else ""
            what = f"the {'gradient' if incident.rank is None else 'loss'} of step {step} is not finite{where}"
            done = "the step is skipped" if incident.policy == "skip" else "zeros are put in its place"
            limit = self.job.recipe.train.non_finite_limit
            self._console.warn(
                f"{what}: {done} ({incident.in_a_row} of at most {limit} in a row, {incident.total} in all; the "
                "journal has every one)."
            )

    def _ending(self, error: DivergedError) -> DivergedError:
        """The error with the newest checkpoint named: that of the state before the step, saved now if it was not.

        A state that a step before has spoilt already (a finite gradient times a huge rate) is not worth saving.
        """
        self._agreement.finish()
        self._report(self._writer.wait())
        paths = self._store.paths()
        is_new = not paths or step_of(paths[-1]) < self.job.step
        if self.job.world.is_main and is_new and is_finite(self.job.model_tensors().values()):
            self._save()
            self._report(self._writer.wait())
        self._tracker.event("diverged", step=self.job.step, epoch=self.job.epoch + 1, reason=str(error))
        words = decided_by_main(self.job.world, self._checkpoint_words)
        return DivergedError(f"{error} {words}")

    def _checkpoint_words(self) -> str:
        paths = self._store.paths()
        return f"The newest checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."

    def _log(self, losses: torch.Tensor) -> None:
        job, world = self.job, self.job.world
        names = SYSTEM_METRICS if job.recipe.tracking.system_metrics else ()
        num_shards = len(losses)
        report = torch.zeros(num_shards + world.num_nodes * len(names), dtype=torch.float64)
        report[:num_shards] = losses
        starts = [num_shards + node * len(names) for node in range(world.num_nodes)]
        places = [slice(start, start + len(names)) for start in starts]
        if self._sampler is not None:
            report[places[world.node]] = torch.tensor(self._sampler.latest(), dtype=torch.float64)
        # Every number in it is one worker's own, and zero on the others: only this sum rounds, in the shards' order.
        loss = math.fsum(sum_(report)[:num_shards].tolist())
        now = time.monotonic()
        rate = self._samples_since_log / max(now - self._last_log, 1e-9)
        self._last_log, self._samples_since_log = now, 0
        metrics = {
            "train/loss": loss,
            "train/images_per_second": rate,
            "train/learning_rate": job.schedule.learning_rate(job.step - 1),
            "train/epoch": job.step / job.steps_per_epoch,
        }
        if names:
            for node, place in enumerate(places):
                metrics.update(node_metrics(node, report[place].tolist()))
        self._tracker.metrics(job.step, metrics)
        self._console.progress(job.step, 1 + (job.step - 1) // job.steps_per_epoch, job.num_epochs, loss, rate)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Around the steps of an epoch: its time is logged if it was run from its first step to its last."""
        whole = self.job.step % self.job.steps_per_epoch == 0
        self._last_log, self._samples_since_log = time.monotonic(), 0
        started = time.monotonic()
        try:
            yield
        except DivergedError as error:
            raise self._ending(error) from None
        seconds = time.monotonic() - started
        self._act(self._agreement.finish())
        if self.job.step % self.job.steps_per_epoch == 0:
            self._save_unless_saved()
        if whole and self.job.step % self.job.steps_per_epoch == 0:
            self._tracker.metrics(self.job.step, {"train/epoch_seconds": seconds})
            self._pace = f", {seconds:.1f} s, {len(self.job.data.train) / seconds:,.0f} images/s"
            if not self.job.evaluation_is_due:
                self._console.line(f"epoch {self.job.epoch}/{self.job.num_epochs}{self._pace}")

    def evaluate(self) -> None:
        """Evaluate, save a checkpoint that knows the result, and report it. Every rank must call it."""
        job = self.job
        if job.world.size > 1:
            job.parallel.share_buffers_()
        job.progress.at("evaluating", job.step)
        result = evaluate(
            job.model,
            job.eval_loader,
            job.data.test.classes,
            autocast=job.autocast,
            on_batch=job.progress.tick,
        )
        job.metrics = {"eval/accuracy": result.accuracy, "eval/loss": result.loss}
        self._tracker.metrics(job.step, job.metrics)
        self._tracker.event("evaluated", step=job.step, correct=result.correct, total=result.total)
        self._write_evaluation(result)
        where = f"step {job.step}" if job.step % job.steps_per_epoch else f"epoch {job.epoch}/{job.num_epochs}"
        self._console.line(
            f"{where}: accuracy {result.accuracy:.2%} ({result.correct} of {result.total}), "
            f"loss {result.loss:.4f}{self._pace}"
        )
        self._pace = ""
        if job.step >= job.total_steps:
            self._save_or_fail()
        else:
            self._save()

    def _write_evaluation(self, result: Evaluation) -> None:
        job = self.job
        if not job.world.is_main:
            return
        content = {"step": job.step, "epoch": job.epoch, "classes": list(result.classes), **result.to_json()}
        try:
            write_evaluation(self.run_dir, content)
        except OSError as error:
            self._console.warn(f"{self.run_dir / EVALUATION} could not be written: {error}")

    def last_evaluation(self) -> dict[str, float]:
        """Accuracy and loss where the job stands, measured just now or found in the checkpoint."""
        assert self.job.metrics is not None
        return {"accuracy": self.job.metrics["eval/accuracy"], "loss": self.job.metrics["eval/loss"]}

    def close(self) -> None:
        """Finish the checkpoint that is being written."""
        self._report(self._writer.wait())
        self._writer.close()

    def _save_unless_saved(self) -> None:
        """Save, but for a step that is saved, or will be with its evaluation."""
        if self._saved_step != self.job.step and not self.job.evaluation_is_due:
            self._save()

    def _save(self) -> None:
        """Have rank 0 save, beside the training."""
        job = self.job
        self._last_save, self._saved_step = time.monotonic(), job.step
        if job.world.is_main:
            self._report(self._writer.save(job.model_tensors(), job.optimizer_tensors()[0], job.state()))

    def _report(self, outcome: Outcome | None) -> bool:
        """Tell what became of a checkpoint, if anything did; return whether it is there.

        A save that fails is a warning: the checkpoint before stands, and training goes on.
        """
        if outcome is None:
            return False
        if outcome.path is None:
            self._console.warn(f"step {outcome.step} could not be saved: {outcome.error}. {self._checkpoint_words()}")
            self._tracker.event("checkpoint-failed", step=outcome.step, error=str(outcome.error))
            return False
        if not (self.run_dir / RECIPE).exists():
            self._restore_run_dir()
        self._tell_of_waiting(outcome)
        path, waited_s = str(outcome.path.relative_to(self.run_dir)), round(outcome.waited_s, 3)
        self._tracker.event("checkpoint", step=outcome.step, path=path, waited_s=waited_s)
        return True

    def _restore_run_dir(self) -> None:
        """The folder was deleted under the job: the save has made it anew, and here comes what makes it a run again."""
        self._tracker.restore()
        try:
            store_recipe(self.run_dir, self.job.recipe)
        except ConfigurationError as error:
            self._console.warn(f"{self.run_dir} was deleted under the job: {error}")
            return
        self._console.warn(
            f"{self.run_dir} was deleted under the job. It is there again, with recipe, journal and the checkpoint "
            "just saved; what else was in it is gone."
        )

    def _tell_of_waiting(self, outcome: Outcome) -> None:
        if outcome.waited_s > _WORTH_A_WORD_S and not self._has_waited:
            self._has_waited = True
            self._console.warn(
                f"step {outcome.step} waited {outcome.waited_s:.1f} s for the checkpoint before to be written: save "
                "less often (checkpoint.every_steps, checkpoint.every_seconds), or to a faster disk. The journal has "
                "each wait."
            )

    def _save_or_fail(self) -> None:
        with self.job.progress.patiently("saving"):
            self._save()
            saved = decided_by_main(self.job.world, lambda: self._report(self._writer.wait()))
        if not saved:
            raise AgreedError(
                f"the checkpoint of step {self.job.step} could not be saved: make room on the disk of {self.run_dir}, "
                f"and start again with: {go_on_with(self._address)}"
            )
        self.settle(_PATIENCE_S)

    def settle(self, patience_s: float) -> None:
        """Wait until the checkpoints are where the run lives. Raises DisttrainError, on every rank, if they cannot be.

        Every rank must call it: they hear of it every few seconds, so that none takes the others for dead.
        """
        arrival = self._store.settle(patience_s)
        while not decided_by_main(self.job.world, lambda: next(arrival)):
            pass
