"""`disttrain sync`: upload to MLflow what the journal holds and MLflow still lacks."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain.commands.arguments import RUN
from disttrain.commands.options import json_option
from disttrain.layout import DELIVERED
from disttrain.worker import leave, worker

if TYPE_CHECKING:
    from disttrain.tracking import Backlog


@click.command(name="disttrain sync")
@click.argument("run", type=RUN)
@click.option("--uri", help="Upload to this MLflow server instead of the run's own.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    help="Seconds to keep trying.",
)
@json_option
def command(run: str, uri: str | None, timeout_s: float, as_json: bool) -> None:
    """Upload records of RUN that MLflow missed during an outage; repeating it changes nothing."""
    from disttrain.errors import DisttrainError
    from disttrain.files import read_bytes
    from disttrain.recipe.address import is_url
    from disttrain.remote import RemoteRun, local_copy
    from disttrain.tracking import load_state

    with local_copy(run, checkpoints="none") as folder:
        target, missing = _delivered(folder, run, uri, timeout_s)
        mlflow_run_id = load_state(folder).run_id or None
        if is_url(run):
            RemoteRun(run).write(DELIVERED, read_bytes(folder / DELIVERED))
    if as_json:
        lacking = {"journal_records": missing.records, "uploads": missing.files}
        report = {"uri": target, "mlflow_run_id": mlflow_run_id, "complete": not missing, "missing": lacking}
        print(json.dumps(report), flush=True)
    if missing:
        reason = missing.reason or "it did not accept them"
        raise DisttrainError(
            f"MLflow at {target} still lacks {missing} of {run}: {reason}. Run it again once that is fixed."
        )
    if not as_json:
        print(f"MLflow at {target} has everything of {run}")


def _delivered(run: Path, address: str, uri: str | None, timeout_s: float) -> tuple[str, Backlog]:
    """Upload what MLflow lacks of the run in the folder `run`, which lives at `address`.

    Returns where MLflow is, without credentials, and what it lacks still. Raises UsageError, or ConfigurationError if
    the user has to confirm that the server is trusted.
    """
    from disttrain.errors import UsageError, printable
    from disttrain.layout import JOURNAL, RECIPE
    from disttrain.recipe import ask_before_sending, load_recipe_for
    from disttrain.runs.rundir import is_run, refuse_links
    from disttrain.tracking import deliver, load_state, redact, resolve_uri

    def warn(message: str) -> None:
        print(printable(f"warning: {message}"), file=sys.stderr, flush=True)

    if not is_run(run) or not (run / JOURNAL).is_file():
        raise UsageError(f"{run} is not a run directory with a journal: see `disttrain runs list`.")
    refuse_links(run)
    settings = load_recipe_for(str(run / RECIPE), run).tracking
    target = uri or load_state(run).uri or resolve_uri(settings.uri, run)
    if target is None:
        raise UsageError(f"{run}: tracking.uri is 'none', so there is no server to upload to: give --uri.")
    if uri is None:
        ask_before_sending(target, address, f"add --uri {shlex.quote(redact(target))}")
    return redact(target), deliver(run, target, settings.experiment, timeout_s, warn)


if __name__ == "__main__":
    leave(worker(command))
