"""`disttrain sync`: deliver to MLflow what the journal holds and MLflow still lacks."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from disttrain.worker import worker


@click.command(name="disttrain sync")
@click.argument("run")
@click.option("--uri", help="Deliver to this MLflow server, not to the one of the run.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Seconds.")
def command(run: str, uri: str | None, timeout_s: float) -> None:
    """Deliver what MLflow still lacks of RUN; doing it twice changes nothing."""
    from disttrain.recipe.address import is_url
    from disttrain.remote import RemoteRun, local_copy

    with local_copy(run, checkpoints="none") as folder:
        target = _delivered(folder, uri, timeout_s)
        if is_url(run):
            RemoteRun(run).write("mlflow.json", (folder / "mlflow.json").read_bytes())
    print(f"MLflow at {target} has everything of {run}")


def _delivered(run: Path, uri: str | None, timeout_s: float) -> str:
    """Deliver what MLflow lacks, and tell where it is. Raises DisttrainError if something is lacking still."""
    from disttrain.commands.locate import is_run
    from disttrain.errors import DisttrainError, UsageError
    from disttrain.recipe import load_recipe
    from disttrain.rundir import JOURNAL, RECIPE
    from disttrain.tracking import deliver, load_state, redact, resolve_uri

    if not is_run(run) or not (run / JOURNAL).is_file():
        raise UsageError(f"{run} is not a run directory with a journal: see `disttrain runs list`.")
    settings = load_recipe(str(run / RECIPE)).tracking
    target = uri or load_state(run).uri or resolve_uri(settings.uri, run)
    if target is None:
        raise UsageError(f"{run}: tracking.uri is 'none', so there is nowhere to deliver to: give --uri.")
    missing = deliver(run, target, settings.experiment, timeout_s)
    if missing:
        raise DisttrainError(f"MLflow at {redact(target)} still lacks {missing} of {run}: try again when it is up.")
    return redact(target)


if __name__ == "__main__":
    sys.exit(worker(command))
