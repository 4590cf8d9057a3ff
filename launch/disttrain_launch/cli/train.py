"""`disttrain train`."""

from __future__ import annotations

import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disttrain import layout
from disttrain.commands.arguments import RECIPE, run_dir_callback
from disttrain.commands.options import (
    dry_run_option,
    max_losses_option,
    max_restarts_option,
    num_workers_option,
    override_arguments,
    overrides_option,
    trust_option,
)
from disttrain.distributed.gpus import OnePerGpu
from disttrain.errors import ExitCode
from disttrain_launch.cli.node import run_node
from disttrain_launch.cli.node_options import NodeOptions, node_options
from disttrain_launch.cli.recipe_source import (
    checked_recipe,
    mention_old_names,
    recipe_source,
    refuse_more_workers_than_slices,
)
from disttrain_launch.messages import say

if TYPE_CHECKING:
    from disttrain.recipe import Recipe
    from disttrain_launch.local.group import WorkerGroup


@click.command()
@click.argument("recipe", required=False, type=RECIPE)
@num_workers_option
@click.option(
    "--run-dir",
    callback=run_dir_callback,
    metavar="DIR|URL",
    help="Where the run lives: a folder or a URL (default: runs/RECIPE-TIME). Give an existing one to resume it.",
)
@overrides_option
@trust_option
@max_restarts_option
@max_losses_option
@node_options
@dry_run_option
def train(
    recipe: str | None,
    num_workers: int,
    run_dir: str | None,
    overrides: tuple[str, ...],
    trust: bool,
    max_restarts: int,
    max_losses: int,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train RECIPE, a shipped one (see `disttrain recipe list`) or a TOML file.

    Started again with the same --run-dir, a run resumes from its newest checkpoint; RECIPE may then be left out.
    With --nodes and --rendezvous this machine is one of several: start the same command on each.
    """
    from disttrain_launch.local.group import WorkerGroup, module_arguments
    from disttrain_launch.local.watch import MOST_LOSSES
    from disttrain_launch.local.workers import run_workers
    from disttrain_launch.restarts import Restarts

    several = NodeOptions(**options)
    if several.nodes is not None or several.rendezvous is not None:
        run_node(
            recipe, num_workers, run_dir, overrides, several, max_restarts, max_losses, dry_run=dry_run, trust=trust
        )
        return
    checked = checked_recipe(recipe, run_dir, overrides, trust=trust)
    mention_old_names(recipe, run_dir, overrides)
    refuse_more_workers_than_slices(checked, num_workers, f"-n {num_workers}")
    is_named = run_dir is not None
    if dry_run:
        run_dir = run_dir or str(Path("runs", _new_name(checked)).absolute())
        folder = _working_folder(run_dir)
    else:
        run_dir, folder = _opened_run_dir(run_dir, checked)
    arguments = module_arguments(
        "disttrain", recipe_source(recipe, run_dir), "--run-dir", run_dir, *["--trust"] * trust
    )
    count = "gpu" if isinstance(num_workers, OnePerGpu) else num_workers  # or a resume might end up on CPUs
    told = [f"-n {count}"] * (count != 1) + [f"--max-restarts {max_restarts}"] * (max_restarts > 0)
    group = WorkerGroup(
        (*arguments, *override_arguments(overrides)),
        num_workers,
        log_dir=folder / layout.LOGS,
        options=" ".join(told + [f"--max-losses {max_losses}"] * (max_losses != MOST_LOSSES)),
    )
    if dry_run:
        click.echo(group.described())
        return
    say(f"starting {num_workers} worker{'s' if num_workers > 1 else ''}…")
    try:
        stops_after_loss = checked.parallel.on_lost_worker == "stop"
        restarts = Restarts(max_restarts, folder, stops_after_loss=stops_after_loss)
        run_workers(group, restarts, max_losses, lambda: how_to_resume(run_dir, folder, group))
    except SystemExit as ending:
        if not is_named and ExitCode.explains(int(ending.code or 0)):
            _remove_unused(folder)
        raise


def how_to_resume(run_dir: str, folder: Path, group: WorkerGroup) -> str:
    """What to do after the loss of a worker that ended the run; empty if it has no checkpoint."""
    from disttrain.runs.rundir import resume_command

    newest = layout.newest_checkpoint(folder)
    command = resume_command(run_dir, group.environment(0, 0))
    return f"the newest checkpoint is of step {layout.step_of(newest)}; resume with: {command}" if newest else ""


def _remove_unused(folder: Path) -> None:
    """Remove the folder made for a run that was refused before it began, and has said why; not if it logged more."""
    with suppress(OSError):
        has_logged = any(log.stat().st_size for log in (folder / layout.LOGS).iterdir())
        if not has_logged and {entry.name for entry in folder.iterdir()} <= layout.OF_A_KILLED_START:
            shutil.rmtree(folder)


def _opened_run_dir(run_dir: str | None, recipe: Recipe) -> tuple[str, Path]:
    """Where the run lives, and the folder in which it is worked on, made and checked."""
    from disttrain.recipe.address import is_url

    if run_dir is None:
        folder = _made(recipe)
        return str(folder), folder
    folder = _working_folder(run_dir)
    return run_dir, _with_logs(folder) if is_url(run_dir) else _opened(folder)


def _working_folder(run_dir: str) -> Path:
    from disttrain.recipe.address import is_url, working_folder

    return working_folder(run_dir) if is_url(run_dir) else Path(run_dir)


def _opened(run_dir: Path) -> Path:
    """The run directory, with its folder for logs; one that holds something else is left alone."""
    from disttrain.recipe import ConfigurationError, recipe_of_checkpoints

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in run_dir.iterdir()}
        is_run = layout.RECIPE in names or recipe_of_checkpoints(run_dir) is not None
        if not is_run and names - layout.OF_A_KILLED_START:
            raise ConfigurationError(
                f"--run-dir {run_dir}: is not empty and not a run directory (it has no {layout.RECIPE}); give "
                "another one"
            )
    except FileExistsError as error:
        raise ConfigurationError(f"--run-dir {run_dir}: {error.filename} is a file; give a folder") from None
    except OSError as error:
        raise ConfigurationError(f"--run-dir {run_dir}: {error.strerror}; give another one") from None
    except RecursionError:
        raise ConfigurationError(f"--run-dir: {len(run_dir.parts)} folders within each other; give fewer") from None
    return _with_logs(run_dir)


def _with_logs(folder: Path) -> Path:
    """The folder, with one for logs in it."""
    from disttrain.recipe import ConfigurationError, make_folder

    try:
        make_folder(folder / layout.LOGS)
    except OSError as error:
        raise ConfigurationError(f"{folder / layout.LOGS}: {error.strerror}; a run cannot be written there") from None
    return folder


def _made(recipe: Recipe) -> Path:
    """A new run directory under ./runs; two runs that begin in the same second get two."""
    stem, runs = _new_name(recipe), Path("runs").absolute()
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 100))):
        try:
            (runs / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # _opened reports what is wrong
        return _opened(runs / name)
    raise AssertionError(f"a hundred runs called {stem}")


def _new_name(recipe: Recipe) -> str:
    return f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
