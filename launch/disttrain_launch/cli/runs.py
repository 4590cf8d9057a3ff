"""`disttrain runs list|show|verify|hash`."""

from __future__ import annotations

import os

import click

from disttrain_launch.cli.arguments import RUN
from disttrain_launch.cli.options import json_option
from disttrain_launch.cli.worker_commands import become


@click.group()
def runs() -> None:
    """Inspect runs and their checkpoints."""


@runs.command("list")
@click.option("--runs-dir", default="runs", show_default=True, help="The folder of runs, or a URL.")
@json_option
def list_runs(runs_dir: str, as_json: bool) -> None:
    """List the runs, newest last."""
    become("disttrain.commands.runs", "list", "--runs-dir", os.path.expanduser(runs_dir), *["--json"] * as_json)


@runs.command()
@click.argument("run", type=RUN)
@json_option
def show(run: str, as_json: bool) -> None:
    """Show how far RUN has come and what it has saved."""
    become("disttrain.commands.runs", "show", run, *["--json"] * as_json)


@runs.command()
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
@json_option
def verify(run: str, as_json: bool) -> None:
    """Check every file of every checkpoint of RUN against its SHA-256."""
    become("disttrain.commands.runs", "verify", run, *["--json"] * as_json)


@runs.command("hash")
@click.argument("run", metavar="RUN|CHECKPOINT", type=RUN)
def hash_weights(run: str) -> None:
    """Print one SHA-256 over the weights of RUN's newest checkpoint."""
    become("disttrain.commands.runs", "hash", run)
