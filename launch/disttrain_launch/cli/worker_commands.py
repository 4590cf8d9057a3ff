"""Commands that need torch: they run in workers, this process only starts those."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from disttrain_launch.cli.arguments import FILE, RUN
from disttrain_launch.cli.options import (
    json_option,
    num_workers_option,
    override_arguments,
    overrides_option,
    raw_option,
    trust_option,
)
from disttrain_launch.local.group import WorkerGroup, module_arguments


def become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by `python -m module`: one process, so signals and its exit code need no messenger."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *module_arguments(module, *arguments)])


@click.command(short_help="Measure accuracy on the held-out set.")
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
@num_workers_option
@overrides_option
@json_option
@raw_option
@trust_option
def evaluate(run: str, num_workers: int, overrides: tuple[str, ...], as_json: bool, raw: bool, trust: bool) -> None:
    """Measure the accuracy of a run's newest checkpoint, or of the one given, on the held-out set."""
    from disttrain_launch.local.workers import run_workers

    words = (run, *override_arguments(overrides), *["--json"] * as_json, *["--raw"] * raw, *["--trust"] * trust)
    run_workers(WorkerGroup(module_arguments("disttrain.commands.evaluate", *words), num_workers))


@click.command()
@click.argument("run", type=RUN)
@click.option("--uri", help="Upload to this MLflow server, not to the run's own.")
@click.option("--timeout", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Seconds to try for.")
@json_option
def sync(run: str, uri: str | None, timeout: float, as_json: bool) -> None:
    """Deliver to MLflow what it still lacks of RUN; doing it twice changes nothing."""
    options = [*(["--uri", uri] if uri else []), "--timeout", str(timeout), *["--json"] * as_json]
    become("disttrain.commands.sync", run, *options)


@click.command()
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@click.option("--top", type=click.IntRange(min=1), help="Of an image, how many classes to name (3 if not given).")
@click.option("-o", "--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the task's predict.")
@json_option
@raw_option
@trust_option
def predict(
    run: str, files: tuple[str, ...], top: int | None, options: tuple[str, ...], as_json: bool, raw: bool, trust: bool
) -> None:
    """Predict what each FILE holds: an image's most probable classes, or whatever the run's task predicts."""
    given = [*([f"--top={top}"] if top is not None else []), *(f"--option={option}" for option in options)]
    flags = [*["--json"] * as_json, *["--raw"] * raw, *["--trust"] * trust]
    become("disttrain.commands.predict", run, *files, *given, *flags)
