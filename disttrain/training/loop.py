"""Training: the loop on one page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disttrain import rng
from disttrain.data import Batch, StepBatch
from disttrain.distributed.allocator import freed_memory_kept
from disttrain.distributed.collectives import sum_
from disttrain.distributed.launched import OUR_LAUNCHERS, launched_by, rank_hint
from disttrain.distributed.world import join_world, joins_later
from disttrain.errors import DisttrainError, UserCodeError
from disttrain.faultpoints import reached
from disttrain.health.nonfinite import Verdict, marked
from disttrain.health.spikes import RolledBack
from disttrain.health.stop import stop_requests
from disttrain.parallel.conditions import exact_conditions, float32_by_default, sums_in_fixed_order
from disttrain.recipe import Recipe, as_recipe, ask_before_resuming, is_own_recipe, load_recipe_for, old_names_in
from disttrain.recipe.reference import look_for_code
from disttrain.task import Task, named_at
from disttrain.terminal.output import leave_the_launchers_streams
from disttrain.training.audit import Corruption, audit, is_audited
from disttrain.training.backward import backward_from, constant_over
from disttrain.training.compiled import compiled_for_each_shape, own_gradients, replays_graphs
from disttrain.training.compiler import compiler_when_used
from disttrain.training.given import Given
from disttrain.training.hooks import Hook
from disttrain.training.job import Job, StepResult
from disttrain.training.joining import open_joining
from disttrain.training.monitor import RunMonitor
from disttrain.training.optim import set_learning_rates
from disttrain.training.parts import on_parts
from disttrain.training.preflight.model import rehearse
from disttrain.training.recoverable import asks_to_continue
from disttrain.training.recovery import Recovery
from disttrain.training.result import Result
from disttrain.training.session import open_session
from disttrain.training.shortage import name_shortage, shortage_in_evaluation, shortage_in_step
from disttrain.training.succession import Succession


def train(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    overrides: Sequence[str] = (),
    run_dir: Path | str | None = None,
    model: nn.Module | Callable[..., nn.Module] | None = None,
    train_set: Any = None,
    test_set: Any = None,
    task: Task | Callable[..., Task] | None = None,
    hooks: Sequence[Hook | Callable[[], Hook]] | Hook | Callable[[], Hook] = (),
    trust: bool = False,
) -> Result:
    """Train what `recipe` says (a Recipe, a mapping, the name of a shipped one, or a path); return how it ended.

    Runs as the worker that the launcher's variables make of this process, or alone without them. A `run_dir` that
    holds a run already is resumed; the default is a new folder under ./runs. `model`, `train_set`, `test_set` and
    `task` take the place of what the recipe names:

    - a set is a map-style Dataset of what the task's `collate` takes; for images, of (image, label), or two tensors;
    - a model is a module, or a class or function that makes one of those of `task.model_arguments` that it names: for
      images `num_classes` and `sample_shape`;
    - a task is an object, or a class, which is called with `task.options` and, as far as it names them, `train_set` and
      `recipe`.

    `hooks`, objects or classes (or a single one), are called after those of `train.hooks`.

    With `trust`, a run that resumes by the recipe in its own folder may name code to import, and a server to send to.

    Raises RecipeError, ConfigurationError, StoppedError (a checkpoint is saved) or DivergedError, and what the user's
    own code raises.
    """
    return _run(recipe, overrides, run_dir, Given(model, train_set, test_set, task, hooks or None), trust=trust)


def train_as_worker(
    recipe: str, *, overrides: Sequence[str] = (), run_dir: str | None = None, trust: bool = False
) -> None:
    """As `train`, in a process that does nothing else: if it fails, it is still in the process group afterwards.

    Then it must report the failure and end (see `join_world`).
    """
    _run(recipe, overrides, run_dir, Given(), trust=trust, is_whole_process=True)


def _run(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    overrides: Sequence[str],
    run_dir: Path | str | None,
    given: Given,
    *,
    trust: bool,
    is_whole_process: bool = False,
) -> Result:
    try:
        with float32_by_default():
            is_own = isinstance(recipe, str | Path) and is_own_recipe(str(recipe), run_dir)
            settled = load_recipe_for(str(recipe), run_dir, overrides) if is_own else as_recipe(recipe, overrides)
            if not is_own and launched_by() not in OUR_LAUNCHERS and not rank_hint():  # ours have said so themselves
                for line in old_names_in(recipe, overrides):
                    print(f"disttrain: {line}", file=sys.stderr)
            if is_own and run_dir is not None and not trust:
                ask_before_resuming(settled, run_dir, overrides)
            if not settled.name:
                settled = settled.model_copy(update={"name": given.run_name(settled)})
            look_for_code(settled)
            return _train(settled, run_dir, given, is_whole_process=is_whole_process)
    except UserCodeError as error:
        if error.__cause__ is None and error.trace is not None:  # it comes from a process that reads data
            error.add_note(error.trace)
        raise
    except DisttrainError as error:  # its message is complete: no traceback of our own calls above it
        raise error.with_traceback(None) from None


def _train(recipe: Recipe, run_dir: Path | str | None, given: Given, *, is_whole_process: bool) -> Result:
    if not asks_to_continue(recipe):  # else it may take rank 0's place
        leave_the_launchers_streams()
    with (
        stop_requests() as stop,
        freed_memory_kept(),
        sums_in_fixed_order(recipe),
        join_world(
            recipe.train.device,
            recipe.train.threads,
            recipe.train.hang_timeout_s,
            most_sharing_memory=recipe.parallel.most_sharing_memory,
            is_whole_process=is_whole_process,
        ) as world,
        exact_conditions(recipe),
        compiled_for_each_shape(recipe),
        compiler_when_used(),
    ):
        while True:
            opened = open_joining if joins_later() else open_session
            try:
                with opened(recipe, world, run_dir, given, stop) as monitor:
                    metrics = _fit_through_losses(monitor.job, monitor)
                    return Result(monitor.run_dir, monitor.job.step, metrics)
            except RolledBack as spike:  # as after a restart, it resumes from the newest checkpoint
                run_dir = spike.address


def _fit_through_losses(job: Job, monitor: RunMonitor) -> dict[str, float]:
    """As `fit`, without the workers that die meanwhile, where that is possible."""
    recovery = Recovery(job, monitor, Succession(monitor, leads=job.world.is_main and not joins_later()), job.watchdog)
    if joins_later():
        recovery.join()
    while True:
        try:
            with recovery.interrupting():
                metrics = fit(job, monitor, recovery)
        except (RuntimeError, Corruption) as error:
            if isinstance(error, Corruption):
                monitor.tracker.event("corruption", **error.facts)
            recovery.survive(error)
        else:
            recovery.over()
            return metrics


def fit(job: Job, monitor: RunMonitor, recovery: Recovery) -> dict[str, float]:
    """Train from where `job` stands to its last step; return the last evaluation's metrics."""
    while True:
        if job.evaluation_is_due:
            with shortage_in_evaluation(job):
                monitor.evaluate()
        if job.is_finished:
            monitor.at_end()
            return job.evaluation()
        with monitor.epoch():
            for batch in _batches(job):
                reached("step", step=job.step, model=job.model)
                recovery.before_step()
                with shortage_in_step(job):
                    result = None if job.step in job.spikes.skipped else train_step(job, batch)
                job.step, job.metrics = job.step + 1, None
                reached("after the commit", step=job.step)
                monitor.after_step(result, batch.global_weight)
                recovery.after_step()
                del batch  # the next one has its memory


def _batches(job: Job) -> Iterator[StepBatch]:
    """The rest of the epoch, as far as the run goes; what is being done is noted for the watchdog."""
    job.progress.at("loading data", job.step)
    start = job.step % job.steps_per_epoch
    for batch in job.loader.epoch(job.epoch, start, start + job.total_steps - job.step):
        compiles = job.compiles_in("training", (len(part.samples) for part in batch.parts))
        job.progress.at("computing the next step", job.step, patient=compiles)
        yield batch
        del batch
        job.progress.at("loading data", job.step)


def train_step(job: Job, batch: StepBatch) -> StepResult:
    """One step of the optimizer on this worker's share of the global batch; every rank must call it.

    Raises DivergedError, on every rank, if a value that is not finite ends the run: the step is then not made.
    """
    settings, strategy = job.recipe.train, job.strategy
    if strategy.follow_unfreezing():
        rehearse(job)
    set_learning_rates(job.optimizer, job.schedule, job.step)
    job.non_finite.begin_step()
    try:
        losses = _compute_slices(job, batch)
        if strategy.needs_second_pass():
            losses = _compute_slices(job, batch)
    except BaseException as error:
        strategy.abandon_step()
        name_shortage(job, batch, error)
        raise
    if is_audited(job):
        audit(job, batch, losses, _compute_part)
    strategy.finish_step(batch.global_size, job.step)
    job.scaler.unscale_(job.optimizer)
    verdict = job.non_finite.check(job.step, batch, losses)
    is_logged, grad_norm, total_losses = job.is_logged(job.step + 1), None, None
    if verdict is not Verdict.SKIP and settings.clip_norm is not None:
        grad_norm = strategy.clip_(settings.clip_norm)
    elif verdict is not Verdict.SKIP and is_logged:
        grad_norm = strategy.gradient_norm()
    if verdict is not Verdict.UNLESS_BAD and (is_logged or job.spikes.is_on):
        # Each is one rank's own, zero on the others. From here on the step needs no other rank, so none can spoil it.
        total_losses = sum_(losses.to("cpu", torch.float64, copy=True))
    reached("before the commit", step=job.step)
    with on_parts(job.optimizer):
        if verdict is Verdict.STEP:
            job.scaler.step(job.optimizer)
            job.scaler.update()
        elif verdict is not Verdict.SKIP:
            job.optimizer.step()
    if job.ema is not None and verdict is not Verdict.SKIP:
        job.ema.update(job.step, unless=job.non_finite.is_bad())
    job.optimizer.zero_grad(set_to_none=True)
    if strategy.meets_after(job.step):
        job.non_finite.agree()
        strategy.meet_(job.step)
    return StepResult(losses, grad_norm, total_losses)


def _compute_slices(job: Job, batch: StepBatch) -> torch.Tensor:
    """Forward and backward passes of this worker's slices; returns each slice's share of the loss, (num_slices,)."""
    strategy = job.strategy
    losses = torch.zeros(strategy.num_slices, device=job.world.device)
    for part in batch.parts:
        if part.is_filler and strategy.passes_of:
            with job.computing:
                strategy.keep_pace(job.task.loss, part.data, is_last=part.closes_slice)
            continue
        losses[part.slice_index].add_(_compute_part(job, part, batch))
        more_comes = part is not batch.parts[-1] or is_audited(job)
        if more_comes and part.opens_slice and replays_graphs(job.recipe.train, job.world.device):
            own_gradients(job.model)  # what comes adds to them, or as the next slice writes over them
        if part.closes_slice:
            strategy.close_slice(part.slice_index)
    return losses


def _compute_part(job: Job, part: Batch, batch: StepBatch) -> torch.Tensor:
    """Forward and backward pass of a part of a slice; returns its share of the step's loss, ()."""
    strategy = job.strategy
    if part.opens_slice:
        rng.seed_layers(job.world.device, job.recipe.train.seed, job.step, part.slice_index)
        strategy.open_slice()
    with named_at(job.task, "loss", f" at step {job.step + 1}"), job.computing:
        loss = strategy.loss(job.task.loss, part.data, num_samples=part.samples.numel(), is_last=part.closes_slice)
    weight, scale = max(1, batch.global_weight), strategy.loss_scale
    share = loss.detach() / weight
    if part.is_filler:
        share, scale = share * 0.0, 0.0
    # The gradient of that share, scaled. Autograd would find the same bits by five more nodes, which take longer.
    if job.scaler.is_enabled():
        gradient = marked(job.scaler.scale(torch.full_like(share, scale)).to(share.dtype), share) / weight
    else:
        gradient = marked(constant_over(weight, scale, share.shape, share.dtype, share.device), share)
    if not is_audited(job) and part is batch.parts[-1]:  # an audit compares slices before they are summed
        strategy.begin_sum()
    backward_from(loss, gradient)
    reached("backward", step=job.step, slice=part.slice_index, model=job.model)
    return share
