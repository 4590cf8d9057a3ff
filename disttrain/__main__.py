"""A worker: `torchrun -m disttrain RECIPE [-o key=value]... [--run-dir DIR]`, or what `disttrain train` starts."""

from __future__ import annotations

from collections.abc import Sequence

import click

from disttrain.health.stop import ending_undisturbed
from disttrain.terminal.output import have_unbreakable_output
from disttrain.worker import leave, worker


@click.command(name="python -m disttrain")
@click.argument("recipe")
@click.option("-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe.")
@click.option("--run-dir", type=click.Path(file_okay=False), help="Where the run lives; an existing one is resumed.")
@click.option("--trust", is_flag=True, help="RECIPE is that of RUN_DIR, and may name code and a server.")
def command(recipe: str, overrides: Sequence[str], run_dir: str | None, trust: bool) -> None:
    """Train RECIPE, a shipped recipe's name or a TOML file, as one worker."""
    from disttrain.training.loop import train_as_worker

    with ending_undisturbed():
        train_as_worker(recipe, overrides=overrides, run_dir=run_dir, trust=trust)


if __name__ == "__main__":
    have_unbreakable_output()
    leave(worker(command))
