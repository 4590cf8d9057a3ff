"""A training session: one start of a job, from the opening of its run directory to the last line on the console."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from disttrain.checkpoint import CheckpointStore
from disttrain.checkpoint.handout import read_by_main
from disttrain.distributed.collectives import broadcast_from_main, gather_objects
from disttrain.distributed.launched import launched_by
from disttrain.distributed.report import report_failure
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError, DisttrainError, ExitCode, mark_failure
from disttrain.faultpoints import reached
from disttrain.health.progress import Progress
from disttrain.health.spikes import RolledBack, read_skipped
from disttrain.health.stop import StopRequest, stop_file
from disttrain.health.watchdog import Watchdog
from disttrain.layout import CHECKPOINTS, STOP, log_file
from disttrain.models.start import why_nothing_is_turned
from disttrain.parallel.conditions import unlike_the_first
from disttrain.recipe import Recipe
from disttrain.recipe.address import is_url, settled, working_folder
from disttrain.recipe.partners import keys_without_effect
from disttrain.remote import Mirror, MirroredStore, RemoteRun
from disttrain.runs.fence import Fence
from disttrain.runs.lock import PATIENCE_S, patience_across_machines_s
from disttrain.runs.rundir import (
    log_to_file,
    new_run_dir,
    owned_run_dir,
    refuse_another_job,
    stop_logging,
    store_recipe,
)
from disttrain.terminal.console import Console
from disttrain.tracking import SystemSampler
from disttrain.training.apart import why_no_outer_step
from disttrain.training.conclusion import is_concluded, tracked
from disttrain.training.given import Given
from disttrain.training.gradients import where_gradients_meet, why_memory_is_not_shared
from disttrain.training.init import start_from_images, start_from_weights
from disttrain.training.job import Job, build_job
from disttrain.training.monitor import RunMonitor
from disttrain.training.preflight.exactness import try_exactness
from disttrain.training.preflight.model import check_model
from disttrain.training.preflight.state import check_state
from disttrain.training.preflight.warmup import warm_up
from disttrain.training.recoverable import what_a_loss_means, why_losses_do_not_end_it
from disttrain.training.resume import resume
from disttrain.training.sharding import refuse_unshardable
from disttrain.training.sources import sources_of, why_unlike

_log = logging.getLogger("disttrain")


@contextmanager
def open_session(
    recipe: Recipe, world: World, run_dir: Path | str | None, given: Given, stop: StopRequest
) -> Iterator[RunMonitor]:
    """Open the run directory, build the job where it left off, and close everything whatever happens.

    Every rank must call it. Raises ConfigurationError if anything that the recipe names does not fit.
    """
    address = broadcast_from_main(world, lambda: settled(str(run_dir or new_run_dir(recipe))))
    path = Path(broadcast_from_main(world, lambda: str(working_folder(address) if is_url(address) else address)))
    console = Console(speaks=world.is_main)
    keep = {"keep_last": recipe.checkpoint.keep_last, "keep_best": recipe.checkpoint.keep_best}
    store = CheckpointStore(path / CHECKPOINTS, **keep)
    with ExitStack() as until_the_end:

        def own() -> None:
            nonlocal store
            is_one_of_several = world.num_nodes > 1 or world.slot is not None
            across_machines_s = patience_across_machines_s(recipe.train.hang_timeout_s)
            patience_s = across_machines_s if is_one_of_several else PATIENCE_S
            until_the_end.enter_context(
                owned_run_dir(path, whatever_is_there=is_url(address), patience_s=patience_s, say=console.warn)
            )
            if is_url(address):
                store = MirroredStore(
                    until_the_end.enter_context(Mirror(RemoteRun(address), path, console.warn)), **keep
                )
            if is_one_of_several:
                store.guard = Fence(path, end_at_once).check
            refuse_another_job(path, recipe, warnings.append)

        warnings: list[str] = []
        broadcast_from_main(world, own)
        handler = log_to_file(path, world.rank)
        until_the_end.callback(stop_logging, handler)
        for warning in warnings:  # where they are logged, too
            console.warn(warning)
        progress, watchdog = until_the_end.enter_context(watched(path, recipe, world))
        with _session_in(path, address, recipe, world, given, stop, progress, watchdog, console, store) as monitor:
            yield monitor


@contextmanager
def watched(path: Path, recipe: Recipe, world: World) -> Iterator[tuple[Progress, Watchdog | None]]:
    """The progress of this worker, with a watchdog over that of all."""
    progress = Progress()
    if world.size == 1 and launched_by() == "python":  # no rank waits for it, and the user may be debugging it
        yield progress, None
        return
    with Watchdog(world, progress, recipe.train.hang_timeout_s, log_file(path, world.rank), end_at_once) as watchdog:
        yield progress, watchdog


def end_at_once(why: str) -> NoReturn:
    """End a process whose main thread will not come back, or must write no more: nothing has to be cleaned up."""
    report_failure(why, ExitCode.FAILURE, None, time.time(), is_agreed=True)
    os._exit(ExitCode.FAILURE)


@contextmanager
def _session_in(
    path: Path,
    address: str,
    recipe: Recipe,
    world: World,
    given: Given,
    stop: StopRequest,
    progress: Progress,
    watchdog: Watchdog | None,
    console: Console,
    store: CheckpointStore,
) -> Iterator[RunMonitor]:
    reached("start")
    try:
        if world.is_main:
            store.clear_unfinished()
        checkpoint = read_by_main(world, lambda: store.newest(console.warn))
        refuse_unshardable(recipe, world, given)
        with console.relaying("disttrain.data"):
            job = build_job(recipe, world, given, path)
        store.rank_by(job.best)
        check_state(job)
        job.progress, job.watchdog = progress, watchdog
        if job.spikes.is_on:
            job.spikes.skipped = broadcast_from_main(world, lambda: read_skipped(path))
        resumed = checkpoint is not None
        if checkpoint is not None:
            differences = resume(job, checkpoint)
            for difference in differences if not job.is_finished else []:
                console.warn(f"the environment has changed since the checkpoint: {difference}; the bits may differ.")
        elif recipe.model.init is not None:
            for line in start_from_weights(job):
                console.line(line)
        elif recipe.model.whiten is not None:
            for line in start_from_images(job):
                console.line(line)
        checkpoint = None  # rank 0 would keep a second copy of the weights for as long as the run lives
        if not job.is_finished:
            check_model(job, console.warn)
            if words := warm_up(job):
                console.line(words)
        if world.num_nodes > 1 and (words := why_unlike(gather_objects(sources_of(recipe)))):
            raise ConfigurationError(f"the workers do not compute the same: {words}. Give all machines the same.")
        if not job.strategy.bits_depend_on_world_size and not job.is_finished:
            for difference in unlike_the_first(gather_objects(job.environment_fingerprint)):
                console.warn(f"the workers differ: {difference}; the bits may differ from other runs'.")
            try_exactness(job)
        broadcast_from_main(world, lambda: store_recipe(path, recipe))
        is_done = broadcast_from_main(world, lambda: is_concluded(job, path))
        _introduce(job, address, console, is_done=is_done)
        with (
            console,
            closing(job),
            SystemSampler() if world.is_local_main and recipe.tracking.system_metrics else nullcontext() as sampler,
            tracked(job, path, address, console, stop, guard=store.guard, resumed=resumed, is_done=is_done) as tracker,
            ExitStack() as until_the_end,
            closing(
                RunMonitor(job, path, store, tracker, console, stop, sampler, address, until_the_end, is_done=is_done)
            ) as monitor,
            stop_file(path / STOP, stop, console.line) if world.is_main else nullcontext(),
        ):
            try:
                if job.is_finished:  # it may have ended without being able to bring all of it to its URL
                    monitor.saver.settle(0)
                if job.init is not None and not resumed:
                    tracker.event("init", **job.init)
                if (job.spikes.is_on or job.init is not None) and not resumed:
                    monitor.saver.save()  # something to go back to; what it started from is not read again
                yield monitor
            finally:
                progress.at("ending", job.step, patient=True)
    except RolledBack:
        raise
    except Exception as error:
        mark_failure(error)
        if not isinstance(error, DisttrainError):
            _log.exception("failed")
        elif error.trace is not None:
            _log.error("failed\n%s", error.trace)
        raise


def _introduce(job: Job, address: str, console: Console, *, is_done: bool) -> None:
    world = job.world
    num_parameters = sum(parameter.numel() for parameter in job.model.parameters())
    num_frozen = sum(parameter.numel() for parameter in job.model.parameters() if not parameter.requires_grad)
    frozen = f", {num_frozen:,} frozen" if num_frozen else ""
    console.line(f"{job.recipe.name}: {job.model_name} ({num_parameters:,} parameters{frozen}) on {job.data_words}")
    meeting = f", gradients in {where_gradients_meet(world)}" if world.sums is not None else ""
    workers = f"{world.size} worker{'s' if world.size > 1 else ''} on {world.device.type}"
    console.line(f"{workers}; {job.strategy.reason}{meeting}")
    of_losses = (what_a_loss_means(job), why_losses_do_not_end_it(job.recipe))
    layout = why_nothing_is_turned(job.model) if job.recipe.train.channels_last else None
    of_ways = (why_no_outer_step(job), why_memory_is_not_shared(world, job.recipe), layout)
    remarks = (world.remark, *of_losses, *of_ways, *keys_without_effect(job.recipe))
    for remark in filter(None, remarks):
        console.line(remark)
    early = f"; {job.early_stopping.words()}" if job.step < job.total_steps else ""
    if is_done:
        console.line(f"{address} is already finished: {job.step} of {job.total_steps} steps{early}.")
    elif job.is_finished:
        console.line(f"{address} was interrupted after its last step: finishing it")
    elif job.step:
        console.line(f"resuming from step {job.step} of {job.total_steps} in {address}")
