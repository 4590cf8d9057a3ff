"""A training session: one start of a job, from the opening of its run directory to the last line on the console."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from disttrain.bookkeeper import Bookkeeper
from disttrain.checkpoint import CheckpointStore
from disttrain.collectives import decided_by_main, gather_objects
from disttrain.conditions import unlike_the_first
from disttrain.console import Console
from disttrain.errors import DisttrainError, ExitCode, StoppedError, mark_failure
from disttrain.faultpoints import reached
from disttrain.guard import StopRequest, stop_file
from disttrain.job import Job, build_job, newest_checkpoint
from disttrain.model_check import check_model
from disttrain.progress import Progress
from disttrain.recipe import Recipe
from disttrain.recipe.address import is_url, working_folder
from disttrain.remote import Mirror, MirroredStore, RemoteRun
from disttrain.report import report_failure
from disttrain.rundir import (
    CHECKPOINTS,
    STOP,
    log_file,
    log_to_file,
    new_run_dir,
    owned_run_dir,
    refuse_another_job,
    stop_logging,
    store_recipe,
)
from disttrain.spikes import RolledBack, read_skipped
from disttrain.tracking import NullTracker, SystemSampler, Tracker, how_to_open
from disttrain.trial import try_exactness
from disttrain.watchdog import Watchdog
from disttrain.world import World, launched_by

_log = logging.getLogger("disttrain")
# How long MLflow is waited for when a run stops or fails: launchers soon kill what does not end.
_LAST_WORDS_S = 5.0


@contextmanager
def open_session(
    recipe: Recipe, world: World, run_dir: Path | str | None, objects: dict[str, Any], stop: StopRequest
) -> Iterator[Bookkeeper]:
    """Open the run directory, build the job where it left off, and close everything whatever happens.

    Every rank must call it. Raises ConfigurationError if anything that the recipe names does not fit.
    """
    address = decided_by_main(world, lambda: str(run_dir or new_run_dir(recipe)))
    path = Path(decided_by_main(world, lambda: str(working_folder(address) if is_url(address) else address)))
    console = Console(speaks=world.is_main)
    keep = {"keep_last": recipe.checkpoint.keep_last, "keep_best": recipe.checkpoint.keep_best}
    store = CheckpointStore(path / CHECKPOINTS, **keep)
    with ExitStack() as until_the_end:

        def own() -> None:
            nonlocal store
            until_the_end.enter_context(owned_run_dir(path, whatever_is_there=is_url(address)))
            if is_url(address):
                store = MirroredStore(
                    until_the_end.enter_context(Mirror(RemoteRun(address), path, console.warn)), **keep
                )
            refuse_another_job(path, recipe)

        decided_by_main(world, own)
        handler = log_to_file(path, world.rank)
        until_the_end.callback(stop_logging, handler)
        progress = until_the_end.enter_context(_watched(path, recipe, world))
        with _session_in(path, address, recipe, world, objects, stop, progress, console, store) as books:
            yield books


@contextmanager
def _watched(path: Path, recipe: Recipe, world: World) -> Iterator[Progress]:
    """The progress of this worker, with a watchdog over that of all."""
    progress = Progress()
    if world.size == 1 and launched_by() == "python":  # nobody waits for it, and somebody may be debugging it
        yield progress
        return
    with Watchdog(world, progress, recipe.train.hang_timeout_s, log_file(path, world.rank), _end_of_a_hang):
        yield progress


def _end_of_a_hang(verdict: str) -> NoReturn:
    """Whatever the main thread is in, it will not come back: nothing can be cleaned up, and nothing has to be."""
    report_failure(verdict, ExitCode.FAILURE, None, time.time(), is_agreed=True)
    os._exit(ExitCode.FAILURE)


@contextmanager
def _session_in(
    path: Path,
    address: str,
    recipe: Recipe,
    world: World,
    objects: dict[str, Any],
    stop: StopRequest,
    progress: Progress,
    console: Console,
    store: CheckpointStore,
) -> Iterator[Bookkeeper]:
    reached("start")
    try:
        if world.is_main:
            store.clear_unfinished()
        checkpoint = newest_checkpoint(store, world, console.warn)
        with console.relaying("disttrain.data"):
            job = build_job(recipe, world, objects)
        job.progress = progress
        if job.spikes.is_on:
            job.spikes.skipped = decided_by_main(world, lambda: read_skipped(path))
        resumed = checkpoint is not None
        if checkpoint is not None:
            differences = job.resume(checkpoint)
            for difference in differences if not job.is_finished else []:
                console.warn(f"the checkpoint rests on something else: {difference}; the bits may differ.")
        checkpoint = None  # rank 0 would keep a second copy of the weights for as long as the run lives
        if not job.is_finished:
            check_model(job)
        if recipe.parallel.exact and not job.is_finished:
            for difference in unlike_the_first(gather_objects(job.rests_on())):
                console.warn(f"the workers are not alike: {difference}; the bits may differ from other runs'.")
            try_exactness(job)
        decided_by_main(world, lambda: store_recipe(path, recipe))
        _introduce(job, address, console)
        with (
            console,
            closing(job),
            SystemSampler() if world.is_local_main and recipe.tracking.system_metrics else nullcontext() as sampler,
            _tracked(job, path, address, console, resumed=resumed) as tracker,
            closing(Bookkeeper(job, path, store, tracker, console, stop, sampler, address)) as books,
            stop_file(path / STOP, stop, console.line) if world.is_main else nullcontext(),
        ):
            try:
                if job.is_finished:  # it may have ended without being able to bring all of it to its URL
                    books.saver.settle(0)
                if job.spikes.is_on and not resumed:
                    books.saver.save()  # so that there is something to go back to
                yield books
            finally:
                progress.at("ending", job.step, patient=True)
    except RolledBack:
        raise
    except Exception as error:
        mark_failure(error)
        if not isinstance(error, DisttrainError):
            _log.exception("failed")
        raise


@contextmanager
def _tracked(
    job: Job, run_dir: Path, address: str, console: Console, *, resumed: bool
) -> Iterator[Tracker | NullTracker]:
    """Journal and MLflow run of the job, with how it ended."""
    if not job.world.is_main or job.is_finished:
        yield NullTracker()
        return
    started = time.monotonic()
    world_info = {
        "launcher": launched_by(),
        "world_size": job.world.size,
        "num_nodes": job.world.num_nodes,
        "strategy": job.parallel.name,
        "host": job.world.host,
    }
    tracker = Tracker(run_dir, job.recipe, world_info, warn=console.warn)
    tracker.start(resumed=resumed, params=job.recipe.model_dump(mode="json"), tags=job.rests_on())
    console.start_progress(job.step, job.total_steps)
    try:
        yield tracker
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
    tracker.event("finished", step=job.step)
    split = job.data.train
    tracker.model(job.model, split.mean, split.std, split.classes, split.sample_shape)
    tracker.finish("FINISHED")
    _conclude(job, address, console, tracker, seconds)


def _introduce(job: Job, address: str, console: Console) -> None:
    world, data = job.world, job.data
    num_parameters = sum(parameter.numel() for parameter in job.model.parameters())
    console.line(
        f"{job.recipe.name}: {job.model_name} ({num_parameters:,} parameters) on {job.data_name} "
        f"({len(data.train):,} training, {len(data.test):,} test samples)"
    )
    console.line(f"{world.size} worker{'s' if world.size > 1 else ''} on {world.device.type}; {job.parallel.reason}")
    if job.is_finished:
        console.line(f"{address} is finished already: {job.step} of {job.total_steps} steps.")
    elif job.step:
        console.line(f"going on from step {job.step} of {job.total_steps} in {address}")


def _conclude(job: Job, address: str, console: Console, tracker: Tracker, seconds: float) -> None:
    assert job.metrics is not None
    console.line(f"done in {seconds:.1f} s: accuracy {job.metrics['eval/accuracy']:.2%}")
    console.line(f"run         {address}")
    console.line(f"checkpoint  {address}/{CHECKPOINTS}/step-{job.step:08d}")
    if tracker.uri is not None:
        console.line(f"MLflow      {how_to_open(tracker.uri)}")
