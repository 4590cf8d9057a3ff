"""The record of a job, and its conclusion: what comes between the last step and the prompt.

A run is finished when its journal records it, not when its last step is done. Whatever interrupts the conclusion, the
next start makes up for what is missing: the model, the charts, and what MLflow lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.distributed.launched import launched_by
from disttrain.errors import ConfigurationError, StoppedError, in_digits
from disttrain.faultpoints import reached
from disttrain.health.spikes import RolledBack
from disttrain.health.stop import StopRequest
from disttrain.layout import CHECKPOINTS, JOURNAL, checkpoint_name
from disttrain.task import Task, has_own, named
from disttrain.terminal.console import Console
from disttrain.tracking import Tracker, backlog_of, how_to_open, last_status, load_state, sync_command
from disttrain.training.gradients import where_gradients_meet
from disttrain.training.job import Job

# How long MLflow is waited for when a run stops or fails: launchers soon kill what does not end.
_LAST_WORDS_S = 5.0
# And when it has finished. A server that does not answer is not waited for.
_PATIENCE_S = 120.0
_SILENCE_S = 1.0
_SAY_EVERY_S = 10.0


def is_concluded(job: Job, run_dir: Path) -> bool:
    """Whether the run has nothing left to do but perhaps to upload what MLflow lacks."""
    return job.is_finished and last_status(run_dir / JOURNAL) == "FINISHED"


@contextmanager
def tracked(
    job: Job,
    run_dir: Path,
    address: str,
    console: Console,
    stop: StopRequest,
    *,
    guard: Callable[[], object],
    resumed: bool,
    is_done: bool,
) -> Iterator[Tracker]:
    """Journal and MLflow run of the job, with how it ended. For rank 0; the others get a tracker that does nothing.

    `guard`: as for a `Tracker`. `is_done`: as `is_concluded` had it.
    """
    if not job.world.is_main:
        yield Tracker(run_dir, job.recipe, {}, enabled=False, warn=console.warn)
        return  # also if it has taken the place of rank 0 meanwhile
    if is_done:
        yield Tracker(run_dir, job.recipe, {}, enabled=False)
        tracker = Tracker(run_dir, job.recipe, {}, warn=console.warn)
        if missing := tracker.backlog():
            console.line(f"MLflow lacks {missing} of it: sending (Ctrl-C leaves the rest to `{sync_command(address)}`)")
            tracker.catch_up(timeout_s=_PATIENCE_S, unless=lambda: stop.received is not None)
        return
    started = time.monotonic()
    world_info = {
        "launcher": launched_by(),
        "world_size": job.world.size,
        "num_nodes": job.world.num_nodes,
        "strategy": job.strategy.name,
        "gradients": where_gradients_meet(job.world),
        "host": job.world.host,
    }
    tracker = Tracker(run_dir, job.recipe, world_info, warn=console.warn, guard=guard)
    tracker.start(
        resumed=resumed, params=job.recipe.model_dump(mode="json"), tags=job.environment_fingerprint, step=job.step
    )
    with concluding(job, run_dir, address, console, stop, tracker, started):
        yield tracker


@contextmanager
def concluding(
    job: Job, run_dir: Path, address: str, console: Console, stop: StopRequest, tracker: Tracker, started: float
) -> Iterator[None]:
    """Around the training: its progress, and how it ended. For the worker that keeps the journal.

    `started`: when the job was, by time.monotonic().
    """
    if not job.is_finished:
        console.start_progress(job.step, job.total_steps)
    try:
        yield
    except BaseException as error:
        console.end_progress()
        if isinstance(error, RolledBack):
            tracker.finish("RUNNING", timeout_s=_LAST_WORDS_S)
            raise
        stopped = isinstance(error, StoppedError | KeyboardInterrupt)
        tracker.event("stopped" if stopped else "failed", step=job.step, reason=str(error))
        tracker.finish("KILLED" if stopped else "FAILED", timeout_s=_LAST_WORDS_S)
        raise
    seconds = time.monotonic() - started
    console.end_progress()
    _conclude(job, run_dir, address, console, tracker, stop, seconds)


def _conclude(
    job: Job, run_dir: Path, address: str, console: Console, tracker: Tracker, stop: StopRequest, seconds: float
) -> None:
    assert job.metrics is not None
    reached("conclusion: begun")
    tracker.conclude()
    if _exports_model(job, tracker):
        with console.saying_if_slow("exporting the model for MLflow"), job.as_evaluated():
            tracker.model(job.model, exported_by(job.task), notes_of(job.task))
    elif job.strategy.is_sharded and has_own(job.task, "export") and tracker.exports_models:
        console.line("MLflow gets no model from a sharded run: no worker has all of it")
    reached("conclusion: exported")
    tracker.event("finished", step=job.step)
    # After an earlier request to stop, the wait is no longer than at any stop; a request now ends it.
    patience_s = _PATIENCE_S if stop.received is None else _LAST_WORDS_S
    before, waiting = stop.received, waiting_aloud(console, run_dir, address)
    tracker.finish("FINISHED", timeout_s=patience_s, unless=lambda: waiting() or stop.received != before)
    reached("conclusion: delivered")
    with named(job.task, "headline"):
        headline = job.task.headline(job.evaluation(), {})
    console.line(f"done in {seconds:.1f} s: {headline}")
    console.line(f"run         {address}")
    console.line(f"checkpoint  {address}/{CHECKPOINTS}/{checkpoint_name(job.step)}")
    _name_the_best(job, run_dir, address, console)
    if tracker.uri is not None:
        run = load_state(run_dir)
        for label, text in zip(("MLflow", ""), how_to_open(tracker.uri, run.experiment_id, run.run_id), strict=False):
            console.line(f"{label:<10}  {text}")


def prepare_conclusion(job: Job, tracker: Tracker, console: Console) -> None:
    """Do beforehand, between two epochs, what need not wait for the last step. Every rank must call it."""
    if job.is_finished:
        return
    job.progress.at("preparing to export the model", job.step, patient=True)  # of rank 0; the others wait for it
    if _exports_model(job, tracker):
        with console.saying_if_slow("importing what exporting the model for MLflow takes; training waits for it"):
            tracker.prepare_model()


def _exports_model(job: Job, tracker: Tracker) -> bool:
    """Whether MLflow gets the trained model."""
    return tracker.exports_models and has_own(job.task, "export") and not job.strategy.is_sharded


def waiting_aloud(console: Console, run_dir: Path, address: str) -> Callable[[], bool]:
    """A function that is called while MLflow is waited for, and says so when that takes its time; it returns False."""
    due = time.monotonic() + _SILENCE_S
    first = f"waiting until MLflow has everything (Ctrl-C leaves the rest to `{sync_command(address)}`)"
    lines = chain([first], iter(lambda: f"MLflow still lacks {backlog_of(run_dir)}", None))

    def waiting() -> bool:
        nonlocal due
        if time.monotonic() >= due:
            console.line(next(lines))
            due = time.monotonic() + _SAY_EVERY_S
        return False

    return waiting


def exported_by(task: Task) -> Callable[[nn.Module], tuple[nn.Module, tuple[Any, ...]]]:
    """What exports a model. It raises TaskError for what the task raises, ConfigurationError if it returns no pair."""

    def export(model: nn.Module) -> tuple[nn.Module, tuple[Any, ...]]:
        with named(task, "export"):
            made: Any = task.export(model)
        match made:
            case (nn.Module() as module, tuple() as example):
                return module, example
        found = "None" if made is None else f"a {type(made).__name__}"
        raise ConfigurationError(
            f"{type(task).__name__}.export returned {found}: it has to be a tuple of a module and a tuple of example "
            "arguments"
        )

    return export


def notes_of(task: Task) -> Callable[[], dict[str, Any]]:
    """What says what the exported module takes. It raises TaskError for what the task raises."""

    def notes() -> dict[str, Any]:
        with named(task, "export_notes"):
            return task.export_notes()

    return notes


def _name_the_best(job: Job, run_dir: Path, address: str, console: Console) -> None:
    """Print which checkpoint is the best, unless it is the last."""
    found, name = job.early_stopping, checkpoint_name(job.early_stopping.step)
    if found.value is None or not 0 < found.step < job.step or not (run_dir / CHECKPOINTS / name).is_dir():
        return
    # The last evaluation need not be one that early stopping looked at.
    scores = [job.best.score(metrics) for metrics in (job.evaluation(), {job.best.metric: found.value})]
    if scores[0] is None or scores[1] is None or scores[0] <= scores[1]:
        console.line(f"best        {address}/{CHECKPOINTS}/{name} ({job.best.metric} {in_digits(found.value, 6)})")
