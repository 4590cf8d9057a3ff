"""`disttrain stop`: ask a run to save and stop, from wherever its folder can be reached."""

from __future__ import annotations

import fcntl
import shlex
import time
from pathlib import Path

import click

from disttrain.commands.arguments import RUN
from disttrain.layout import LOCK, RECIPE, STOP, newest_checkpoint

_LOOK_EVERY_S = 0.2


@click.command()
@click.argument("run", type=RUN)
@click.option("--wait", is_flag=True, help="Return when the run has stopped.")
@click.option("--timeout", type=click.FloatRange(min=0), default=600.0, show_default=True, help="Seconds to wait for.")
def stop(run: str, wait: bool, timeout: float) -> None:
    """Ask the job that trains in RUN to save a checkpoint and stop; it then ends with exit code 75.

    Creates the file RUN/stop. All workers stop at the same step, and the file is removed.
    """
    from disttrain.recipe import ConfigurationError, DisttrainError, UsageError, open_to_append

    folder = Path(run)
    if not (folder / RECIPE).is_file():
        raise UsageError(f"{run} is not a run directory (it has no {RECIPE}): see `disttrain runs list`.")
    if not _is_in_use(folder):
        raise UsageError(f"nothing is training in {run}: there is nothing to stop.")
    try:
        open_to_append(folder / STOP).close()
    except OSError as error:
        raise ConfigurationError(f"{folder / STOP} cannot be made: {error.strerror}. Send SIGTERM instead.") from error
    if not wait:
        click.echo(f"{run} has been asked to save and stop; `disttrain runs show {shlex.quote(run)}` shows when it has")
        return
    deadline = time.monotonic() + timeout
    while _is_in_use(folder):
        if time.monotonic() >= deadline:
            raise DisttrainError(f"{run} has not stopped within {timeout:g} s: the request stands.")
        time.sleep(_LOOK_EVERY_S)
    newest = newest_checkpoint(folder)
    click.echo(f"{run} has stopped; {f'its newest checkpoint is {newest}' if newest else 'it has no checkpoint'}")


def _is_in_use(run: Path) -> bool:
    """Whether a job holds the run's lock (see `disttrain.runs.lock`); if none does, it is held here for a moment."""
    from disttrain.recipe import ConfigurationError, open_to_read

    try:
        with open_to_read(run / LOCK) as file:
            fcntl.lockf(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:
        raise ConfigurationError(f"{run / LOCK}: {error.strerror}; no run makes such a lock. Remove it.") from None
    return False
