"""The session of a worker that comes to a run under way: it builds the job alone, and writes nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from disttrain.checkpoint import CheckpointStore
from disttrain.distributed.launched import rank_hint
from disttrain.distributed.world import World
from disttrain.errors import ConfigurationError
from disttrain.health.stop import StopRequest
from disttrain.layout import CHECKPOINTS, RECIPE
from disttrain.recipe import Recipe, load_recipe
from disttrain.recipe.address import is_url, settled, working_folder
from disttrain.runs.rundir import log_to_file, refuse_edited_recipe, stop_logging
from disttrain.terminal.console import Console
from disttrain.tracking import Tracker
from disttrain.training.given import Given
from disttrain.training.job import build_job
from disttrain.training.monitor import RunMonitor
from disttrain.training.preflight.model import check_model
from disttrain.training.preflight.warmup import warm_up
from disttrain.training.session import watched


@contextmanager
def open_joining(
    recipe: Recipe, world: World, run_dir: Path | str | None, given: Given, stop: StopRequest
) -> Iterator[RunMonitor]:
    """Build the job as at its start: what has become of it comes from the others, once they are joined.

    `world` is of this worker alone. The arguments are those of `open_session`. Raises ConfigurationError as that does,
    and if the recipe (as far as the run's folder is seen from here) or, on one machine, code was edited since the run
    began.
    """
    address = settled(str(run_dir))
    path = working_folder(address) if is_url(address) else Path(address)
    console = Console(speaks=False)
    with ExitStack() as until_the_end:
        until_the_end.callback(stop_logging, log_to_file(path, rank_hint() or 0))
        if (path / RECIPE).is_file():
            refuse_edited_recipe(load_recipe(str(path / RECIPE), of_run=True).model_dump(mode="json"), recipe)
        progress, watchdog = until_the_end.enter_context(watched(path, recipe, world))
        job = build_job(recipe, world, given)
        until_the_end.enter_context(closing(job))
        if world.slot is None:  # else this machine's copy may be newer and the same: the launchers compare digests
            refuse_newer_code(path / RECIPE)
        job.progress, job.watchdog = progress, watchdog
        check_model(job, console.warn)
        warm_up(job)
        store = CheckpointStore(
            path / CHECKPOINTS, keep_last=recipe.checkpoint.keep_last, keep_best=recipe.checkpoint.keep_best
        )
        store.rank_by(job.best)
        tracker = Tracker(path, recipe, {}, enabled=False, warn=console.warn)
        until_the_end.enter_context(console)
        later = until_the_end.enter_context(ExitStack())
        monitor = RunMonitor(job, path, store, tracker, console, stop, None, address, later)
        until_the_end.enter_context(closing(monitor))
        try:
            yield monitor
        finally:
            progress.at("ending", job.step, patient=True)


def refuse_newer_code(stored: Path) -> None:
    """Raise ConfigurationError if code that is loaded here was edited after the recipe was `stored` with the run.

    By then the others had built all that it names, of the code as it was. Nothing else would show that this worker
    computes something else than they do.
    """
    try:
        began = stored.stat().st_mtime_ns
    except OSError:
        return
    for module in list(sys.modules.values()):
        file = getattr(module, "__dict__", {}).get("__file__")
        with suppress(OSError, ValueError):  # there is no such file
            if isinstance(file, str) and os.stat(file).st_mtime_ns > began:
                raise ConfigurationError(
                    f"{file} has changed since the run began, and a worker that joins needs it as it was."
                )
