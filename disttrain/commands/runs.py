"""`disttrain runs`: what runs there are, how they stand, and whether their checkpoints are whole."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from disttrain.worker import worker


@click.group(name="disttrain runs")
def command() -> None:
    """Look at runs and their checkpoints."""


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_run_argument = click.argument("run", type=click.Path(path_type=Path))


@command.command(name="list")
@click.option(
    "--runs-dir", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="The folder of runs."
)
@_json_option
def list_runs(runs_dir: Path, as_json: bool) -> None:
    """List the runs, newest last."""
    from disttrain.commands.locate import is_run
    from disttrain.commands.summary import summarise
    from disttrain.errors import UsageError

    if not os.path.isdir(runs_dir):
        what = "is not a folder" if os.path.exists(runs_dir) else "does not exist"
        raise UsageError(f"--runs-dir: {runs_dir} {what}; give the folder that holds the runs.")
    folders = [path for path in runs_dir.iterdir() if path.is_dir() and is_run(path)]
    summaries = [summarise(path) for path in sorted(folders, key=lambda path: path.stat().st_mtime)]
    if as_json:
        print(json.dumps({"runs": summaries}))
        return
    if not summaries:
        print(f"no runs in {runs_dir}")
    width = max((len(summary["name"]) for summary in summaries), default=0)
    for summary in summaries:
        print(f"{summary['name']:<{width}}  {summary['state']:<9} {_words(summary)}")


@command.command()
@_run_argument
@_json_option
def show(run: Path, as_json: bool) -> None:
    """Show how RUN stands."""
    from disttrain.commands.summary import summarise

    summary = summarise(_existing_run(run))
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{summary['name']}: {summary['state']}, {_words(summary)}")
    print(f"workers      {summary['world_size'] or 'unknown'}")
    print(f"MLflow run   {summary['mlflow_run_id'] or 'none'}")
    for checkpoint in summary["checkpoints"]:
        accuracy = "" if checkpoint["accuracy"] is None else f"  accuracy {checkpoint['accuracy']:.2%}"
        print(f"checkpoint   {checkpoint['path']}{accuracy}")


@command.command()
@_run_argument
@_json_option
def verify(run: Path, as_json: bool) -> None:
    """Check each file of the checkpoints of RUN against its manifest; exit 78 if one is damaged."""
    from disttrain.checkpoint import CheckpointStore, verify_checkpoint
    from disttrain.commands.locate import is_checkpoint
    from disttrain.errors import ConfigurationError
    from disttrain.rundir import CHECKPOINTS

    paths = [run] if is_checkpoint(run) else CheckpointStore(_existing_run(run) / CHECKPOINTS).paths()
    checked: list[dict[str, Any]] = []
    for path in paths:
        try:
            verify_checkpoint(path)
        except ConfigurationError as error:
            checked.append({"path": str(path), "good": False, "detail": str(error)})
        else:
            checked.append({"path": str(path), "good": True, "detail": ""})
    if as_json:
        print(json.dumps({"checkpoints": checked}))
    for entry in [] if as_json else checked:
        print(f"{entry['path']}: {'good' if entry['good'] else 'DAMAGED: ' + entry['detail']}")
    damaged = [entry["path"] for entry in checked if not entry["good"]]
    if damaged:
        raise ConfigurationError(f"{len(damaged)} of {len(checked)} checkpoints damaged: {', '.join(damaged)}")
    if not checked and not as_json:
        print(f"{run} has no checkpoint yet")


@command.command(name="hash")
@_run_argument
def hash_weights(run: Path) -> None:
    """Print one SHA-256 over the weights of RUN's newest checkpoint, or of a checkpoint."""
    from disttrain.checkpoint import weights_sha256
    from disttrain.commands.locate import find_checkpoint

    print(weights_sha256(find_checkpoint(run).model))


def _existing_run(path: Path) -> Path:
    from disttrain.commands.locate import is_run
    from disttrain.errors import UsageError

    if not is_run(path):
        raise UsageError(f"{path} is not a run directory: see `disttrain runs list`.")
    return path


def _words(summary: dict[str, Any]) -> str:
    step, total = summary["step"], summary["total_steps"]
    words = f"step {step}" + (f" of {total}" if total else "") + f", epoch {summary['epoch']}"
    accuracy = summary["accuracy"]
    return words if accuracy is None else f"{words}, accuracy {accuracy:.2%}"


if __name__ == "__main__":
    sys.exit(worker(command))
