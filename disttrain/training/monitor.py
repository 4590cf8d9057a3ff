"""What happens between steps: metrics, checkpoints, requests to stop; each decision agreed by all ranks at one step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from disttrain.checkpoint import CheckpointStore
from disttrain.distributed import later
from disttrain.distributed.agreement import Agreement
from disttrain.distributed.collectives import broadcast_from_main, gather_objects, sum_
from disttrain.errors import ConfigurationError, DivergedError, StoppedError
from disttrain.health.spikes import RolledBack, write_skipped
from disttrain.health.stop import StopRequest
from disttrain.runs.rundir import resume_command
from disttrain.terminal.console import Console
from disttrain.tracking import SystemSampler, Tracker
from disttrain.training.audit import agree_on_state
from disttrain.training.evaluations import Evaluations
from disttrain.training.hooks import HookContext
from disttrain.training.job import Job, StepResult
from disttrain.training.machine_report import MachineReport, shortage_words
from disttrain.training.optim import learning_rates
from disttrain.training.saver import Saver


class RunMonitor:
    """Keeps a job's journal, checkpoints and console. Rank 0 writes; the decisions are those of all ranks."""

    def __init__(
        self,
        job: Job,
        run_dir: Path,
        store: CheckpointStore,
        tracker: Tracker,
        console: Console,
        stop: StopRequest,
        sampler: SystemSampler | None,
        address: str,
        until_the_end: ExitStack,
        *,
        is_done: bool = False,
    ) -> None:
        """`until_the_end`: what is closed after this monitor, in the writing worker.

        `is_done`: the run was concluded before, and nothing happens in it any more.
        """
        self.job = job
        self.run_dir = run_dir
        self.saver = Saver(job, run_dir, address, store, tracker, console)
        self.tracker, self.console, self.stop, self.until_the_end = tracker, console, stop, until_the_end
        self.machines = MachineReport(job.world, job.recipe, sampler)
        self._agreement = Agreement(num_flags=2)
        self._last_log = time.monotonic()
        self._items_since_log = self._items_in_epoch = self._num_items = 0  # of all workers, as the task counts them
        self._first_step, self._is_done, self._pace = job.step, is_done, ""
        self.last_result: StepResult | None = None
        """What the step made last came to, on every rank."""
        self.last_num_items = 0
        self._logged_step = -1
        # A step, and its losses and then the norm if it has one, which are on their way from the device.
        self._unlogged: tuple[int, Callable[[], torch.Tensor]] | None = None
        self.evaluations = Evaluations(job, run_dir, self.saver, tracker, console)

    def after_step(self, result: StepResult | None, num_items: int) -> None:
        """Log, save or stop as due after the step just made; `result` is None for a step that was left out.

        Every rank must call it. Raises StoppedError once all ranks have agreed to stop and the checkpoint is saved,
        RolledBack if the loss is a spike, DivergedError if there were too many.
        """
        job, recipe = self.job, self.job.recipe
        self.receive(result, num_items)
        self._log_late()
        # On a GPU a look at the loss waits for the step, so it is looked at only when it is logged, or after the next.
        if result is not None and job.is_logged(job.step):
            if result.total_losses is None:
                norm = [] if result.grad_norm is None else [result.grad_norm.float().view(1)]
                self._unlogged = (job.step, later.to_host_later(torch.cat([result.losses.float(), *norm])))
            else:
                self._log(job.step, result.total_losses, result.grad_norm)
        self.console.progress(job.step, 1 + (job.step - 1) // job.steps_per_epoch, job.num_epochs)
        if result is not None and job.spikes.is_on:
            self._look_for_a_spike(result)
        self._report_incidents()
        if job.hooks:
            job.hooks.after_step(self._context())
        self.saver.poll()
        seconds = recipe.checkpoint.every_seconds
        time_is_up = job.world.is_main and 0 < seconds <= time.monotonic() - self.saver.last_save
        # What was asked for by then must be known before anything is written, and at the end of an epoch.
        is_due = self._save_is_due()
        now = is_due or job.step % job.steps_per_epoch == 0 or job.step == job.total_steps
        answer = self._agreement.ask(self.stop.received is not None, time_is_up, now=now)
        if is_due or True in answer:
            self._act(answer)

    def receive(self, result: StepResult | None, num_items: int) -> None:
        """Take in what a step came to, made here or by another rank."""
        self.last_result, self.last_num_items = result, num_items
        self._items_since_log += num_items
        self._items_in_epoch += num_items
        self._num_items += num_items

    def _act(self, answer: list[bool]) -> None:
        due = self._save_is_due()
        if due or any(answer):
            self.job.non_finite.catch_up()
            self._report_incidents()
            self._log_late()
            answer = [early or late for early, late in zip(answer, self._agreement.finish(), strict=True)]
            agree_on_state(self.job)
        stop, time_is_up = answer
        if stop:
            self.saver.save_or_fail()
            raise StoppedError(
                f"stopped on request{self.stop.words()} after step {self.job.step} of {self.job.total_steps}; the "
                f"checkpoint is saved. Resume with: {resume_command(self.saver.address)}"
            )
        if due or time_is_up:
            self.saver.save_unless_saved()

    def _save_is_due(self) -> bool:
        every = self.job.recipe.checkpoint.every_steps
        return every > 0 and self.job.step % every == 0

    def _report_incidents(self) -> None:
        """Journal steps that were not finite; warn of the first, the second, the fourth, the eighth and so on."""
        for incident in self.job.non_finite.take_incidents():
            fields = asdict(incident)
            step = fields.pop("step")
            self.tracker.event("non-finite", step=step, epoch=1 + (step - 1) // self.job.steps_per_epoch, **fields)
            if incident.total.bit_count() == 1:
                self.console.warn(incident.words(self.job.recipe.train.non_finite_limit))

    def _ending(self, error: DivergedError) -> DivergedError:
        """The error with the newest checkpoint named: that of the state before the step, saved now if it was not.

        A state that a step before has spoilt already (a finite gradient times a huge rate) is not worth saving.
        """
        self._agreement.finish()
        self.saver.save_unless_spoilt()
        self.tracker.event("diverged", step=self.job.step, epoch=self.job.epoch + 1, reason=str(error))
        words = broadcast_from_main(self.job.world, self.saver.words)
        return DivergedError(f"{error} {words}")

    def _look_for_a_spike(self, result: StepResult) -> None:
        job, spikes = self.job, self.job.spikes
        assert result.total_losses is not None
        loss = math.fsum(result.total_losses.tolist())  # as it is logged: in no order
        usual = spikes.normal_loss(loss)
        if usual is None:
            return
        self._agreement.finish()
        self.saver.finish()
        what = f"the loss of step {job.step} is {loss:.4g}, more than {spikes.factor:g} times the usual {usual:.4g}"
        if len(spikes.skipped) >= spikes.limit:
            raise DivergedError(
                f"{what}, and {spikes.limit} steps have been left out already (train.spike_limit): lower optim.lr, set "
                "train.clip_norm, or look at the data."
            )
        broadcast_from_main(job.world, lambda: write_skipped(self.run_dir, spikes.skipped | {job.step - 1}))
        self.tracker.event("spike", step=job.step, loss=loss, usual=usual)
        self.console.warn(f"{what}: returning to the newest checkpoint, and continuing without that step.")
        raise RolledBack(self.saver.address)

    def _log_late(self) -> None:
        """Log a step whose numbers have come meanwhile; of a step that was not made there is nothing to log."""
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is not None and unlogged[0] <= self.job.step:
            step, num_slices, numbers = unlogged[0], self.job.strategy.num_slices, unlogged[1]().double()
            norms = numbers[num_slices:].tolist()
            self._log(step, sum_(numbers[:num_slices].clone()), norms[0] if norms else None)

    def _log(self, step: int, total_losses: torch.Tensor, grad_norm: torch.Tensor | float | None) -> None:
        job, machines = self.job, self.machines.summed()
        loss = math.fsum(total_losses.tolist())  # only this sum rounds, in the slices' order
        now = time.monotonic()
        rate, items = self._items_since_log / max(now - self._last_log, 1e-9), job.task.items
        self._last_log, self._items_since_log = now, 0
        metrics = {
            "train/loss": loss,
            f"train/{'_'.join(items.split())}_per_second": rate,
            **learning_rates(job.optimizer, job.schedule, step - 1),
            "train/epoch": step / job.steps_per_epoch,
        }
        if grad_norm is not None and math.isfinite(norm := float(grad_norm)):  # else the step was not made
            metrics["train/grad_norm"] = norm
        metrics.update(self.machines.metrics(machines))
        self.tracker.metrics(step, metrics)
        self._logged_step = step
        if short := self.machines.short_of_memory(machines):
            self.tracker.event("short-of-memory", step=step, ranks=short)
            self.console.warn(shortage_words(short))
        self.console.measured(loss, f"{rate:,.0f} {items}/s")

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Around the steps of an epoch, or the rest of one: its pace is shown, and its time logged if it is whole."""
        first_step = self.job.step
        self._last_log, self._items_since_log, self._items_in_epoch = time.monotonic(), 0, 0
        started = time.monotonic()
        try:
            yield
            self.job.non_finite.agree()
        except DivergedError as error:
            self.job.step = self.job.non_finite.step_of(self.job.step)
            self._log_late()
            self._report_incidents()
            raise self._ending(error) from None
        self._report_incidents()
        self._log_late()
        seconds = time.monotonic() - started
        self._act(self._agreement.finish())
        self._refuse_no_items()
        if self.job.step % self.job.steps_per_epoch == 0:
            agree_on_state(self.job)
            self.saver.save_unless_saved()
        num_steps, of = self.job.step - first_step, self.job.steps_per_epoch
        is_whole = num_steps == of
        if is_whole:
            self.tracker.metrics(self.job.step, {"train/epoch_seconds": seconds})
        extent = "" if is_whole else f" for {num_steps} of {of} steps"
        self._pace = f", {seconds:.1f} s{extent}, {self._items_in_epoch / seconds:,.0f} {self.job.task.items}/s"
        if self.job.step % of == 0 and not self.job.evaluation_is_due:
            self.console.line(f"epoch {self.job.epoch}/{self.job.num_epochs}{self._pace}")

    def _refuse_no_items(self) -> None:
        """A run of steps that all count nothing would learn nothing, and end as if it had."""
        job, num_steps = self.job, self.job.step - self._first_step
        if self._num_items == 0 and (self._first_step == 0 or num_steps >= job.steps_per_epoch):
            raise ConfigurationError(
                f"the training set holds no {job.task.items} to learn from: {type(job.task).__name__}.weight(batch) is "
                f"0 for each batch of {num_steps} steps; give a training set that holds some."
            )

    def evaluate(self) -> None:
        """Evaluate, save a checkpoint that holds the result, and report it. Every rank must call it."""
        if self.job.step % self.job.steps_per_epoch:
            agree_on_state(self.job)
        self.evaluations.evaluate(self._pace, self._context)
        self._pace = ""

    def make_up(self) -> None:
        """Do what the loss of a worker has kept from being done after the last step. Every rank must call it."""
        job = self.job
        agree_on_state(job)
        self._agreement = Agreement(num_flags=2)  # the question under way is lost: it is asked again at the next step
        counted = gather_objects((self._num_items, self._logged_step))
        self._num_items = max(of_rank for of_rank, _ in counted)  # a newcomer has seen none
        result = self.last_result
        if result is not None and result.total_losses is not None and counted[0][1] < job.step:
            self._log(job.step, result.total_losses, result.grad_norm)
        if job.step % job.steps_per_epoch == 0 or self._save_is_due():
            self.saver.save_unless_saved()
        self.evaluations.make_up(self._pace, self._context)

    def at_end(self) -> None:
        """Have the hooks see the end of the run, unless it was concluded before. Every rank must call it."""
        self.job.strategy.settle_()
        if self.job.hooks and not self._is_done:
            self.job.hooks.at_end(self._context())

    def _context(self) -> HookContext:
        job = self.job
        return HookContext(
            step=job.step,
            total_steps=job.total_steps,
            epoch=job.epoch,
            model=job.model,
            optimizer=job.optimizer,
            metrics=job.evaluation(),
            run_dir=self.run_dir,
            rank=job.world.rank,
            world_size=job.world.size,
            log=lambda metrics: self.tracker.metrics(job.step, metrics),
            as_evaluated=job.as_evaluated,
        )

    def close(self) -> None:
        """Finish the checkpoint that is being written."""
        self.saver.close()
