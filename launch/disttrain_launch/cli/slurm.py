"""`disttrain slurm render|submit`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from disttrain.commands.arguments import RECIPE
from disttrain.commands.options import dry_run_option, json_option, overrides_option, trust_option
from disttrain_launch.slurm import checks

if TYPE_CHECKING:
    from disttrain_launch.slurm.script import SlurmJob

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _workers(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value not in ("gpu", "auto") and not (value.isdigit() and int(value) > 0):
        raise click.BadParameter(f"{value!r} is not a valid number of workers; give 1 or more, gpu or auto.")
    return value


def _job_options(function: _Function) -> _Function:
    """The options of a job; of the same names as those of sbatch where there are such."""
    for decorate in reversed(
        (
            click.argument("recipe", required=False, type=RECIPE),
            overrides_option,
            trust_option,
            click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines."),
            click.option(
                "-n", "--num-workers", "workers", metavar="N|gpu|auto", default="auto", show_default=True,
                callback=_workers, help="Workers on each machine.",
            ),
            click.option("--run-dir", help="Where the run lives (default: runs/NAME); with --sweep, the runs."),
            click.option("--name", callback=checks.job_name, help="Name of the job (default: the recipe's)."),
            click.option("--time", "time", callback=checks.time_limit, metavar="TIME", help="Time limit of a start."),
            click.option("--partition"),
            click.option("--account"),
            click.option("--qos"),
            click.option("--constraint"),
            click.option("--gpus", type=click.IntRange(min=1), help="GPUs on each machine."),
            click.option("--cpus", type=click.IntRange(min=1), help="Cores on each machine."),
            click.option("--mem", callback=checks.memory, metavar="SIZE", help="Memory of each machine."),
            click.option(
                "--warn", "warn_s", type=click.IntRange(min=2), default=180, show_default=True,
                help="Seconds before the time limit at which the job saves, stops and is requeued.",
            ),
            click.option(
                "--stop-grace", "grace_s", type=click.IntRange(min=1), default=120, show_default=True,
                help="Seconds that saving may take.",
            ),
            click.option("--max-restarts", type=click.IntRange(min=0), default=3, show_default=True,
                         help="Restart the workers at most this many times after failures."),
            click.option("--sweep", multiple=True, callback=checks.sweep, metavar="KEY=V,V,…",
                         help="A separate job for each value; several keys make a grid."),
            click.option("--prologue", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                         help="A file of shell lines that every job begins with."),
            click.option("--sbatch", "extra", multiple=True, callback=checks.directives, metavar="NAME=VALUE",
                         help="Any other option of sbatch."),
        )
    ):  # fmt: skip
        function = decorate(function)
    return function


@click.group()
def slurm() -> None:
    """Train on a Slurm cluster."""


@slurm.command()
@_job_options
def render(**options: Any) -> None:
    """Print the batch script of RECIPE; `sbatch` takes it."""
    click.echo(_job(**options).text(), nl=False)


@slurm.command()
@_job_options
@dry_run_option
@json_option
def submit(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Submit RECIPE to Slurm."""
    job = _job(**options)
    if dry_run:
        click.echo(job.text(), nl=False)
        return
    job_id = _submitted(job)
    if as_json:
        click.echo(
            json.dumps({"job_id": job_id, "name": job.name, "run_dir": job.run_dir, "jobs": len(job.points) or 1})
        )
        return
    what = f"an array of {len(job.points)} jobs: its runs are in" if job.points else "its run is"
    click.echo(f"job {job_id} ({job.name}), {what} {job.run_dir}")


def _job(
    recipe: str | None,
    overrides: tuple[str, ...],
    trust: bool,
    nodes: int,
    workers: str,
    run_dir: str | None,
    name: str | None,
    warn_s: int,
    grace_s: int,
    max_restarts: int,
    sweep: tuple[tuple[str, tuple[str, ...]], ...],
    prologue: Path | None,
    extra: tuple[tuple[str, str], ...],
    **resources: Any,
) -> SlurmJob:
    """The job that the options make, checked. Raises click.UsageError, RecipeError or ConfigurationError."""
    from disttrain.recipe import RecipeError, shipped_recipes
    from disttrain.recipe.address import settled
    from disttrain.recipe.continuing import is_led
    from disttrain.recipe.once import is_kept
    from disttrain_launch.cli.recipe_source import checked_recipe, mention_old_names
    from disttrain_launch.slurm.script import SlurmJob, points_of

    if recipe is not None and is_kept(recipe):
        raise RecipeError(f"{recipe}: a job that starts later cannot read it: save the recipe to a file.")
    checks.check_times(warn_s, grace_s)
    run_dir = os.path.expanduser(run_dir) if run_dir is not None else None
    checked = checked_recipe(recipe, run_dir, overrides, trust=trust)
    mention_old_names(recipe, run_dir, overrides)
    checks.check_slices(checked, nodes, workers)
    # Of a sweep, all jobs have the same script.
    points = [checked_recipe(recipe, run_dir, (*overrides, *point), trust=trust) for point in points_of(sweep)]
    is_on_gpus = resources.get("gpus") is not None or workers == "gpu"
    return SlurmJob(
        name=name or re.sub(r"[^A-Za-z0-9_.+-]+", "-", checked.name),
        recipe=recipe if recipe is None or recipe in shipped_recipes() else settled(recipe),
        overrides=overrides,
        run_dir=run_dir or f"runs/{name or checked.name}",
        nodes=nodes,
        workers=workers,
        directives=(*_directives(**resources), *extra),
        warn_s=warn_s,
        grace_s=grace_s,
        max_restarts=max_restarts,
        sweep=sweep,
        trust=trust,
        continues=nodes > 1 and all(is_led(one, on_gpus=is_on_gpus) for one in (checked, *points)),
        stops=checked.parallel.on_lost_worker == "stop",
        prologue=prologue.read_text(encoding="utf-8") if prologue is not None else "",
    )


def _directives(gpus: int | None, cpus: int | None, **words: Any) -> list[tuple[str, str]]:
    numbers = {"gpus-per-node": gpus, "cpus-per-task": cpus}
    return [(name, str(value)) for name, value in {**words, **numbers}.items() if value is not None]


def _submitted(job: SlurmJob) -> str:
    """Hand the script to sbatch; the job's number. Raises ConfigurationError with Slurm's own message."""
    from disttrain.recipe import ConfigurationError

    try:
        script = job.text().encode(errors="surrogateescape")  # the names of files need not be text
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, check=False)
    except OSError as error:
        raise ConfigurationError(
            f"sbatch cannot be run here ({error.strerror}): submit from a machine of the cluster, or copy over what "
            "`disttrain slurm render` prints."
        ) from None
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"exit code {done.returncode}"
        raise ConfigurationError(f"Slurm refused the job: {said}")
    return done.stdout.decode(errors="replace").strip().partition(";")[0]
