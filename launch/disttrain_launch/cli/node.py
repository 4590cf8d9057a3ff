"""`disttrain node`, and `disttrain train --nodes`: this machine's part of a job on several."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING, Any

import click

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
from disttrain.distributed.requests import STOP_SIGNALS
from disttrain_launch.cli.node_options import NodeOptions, node_options, planned_node
from disttrain_launch.cli.recipe_source import (
    checked_recipe,
    mention_old_names,
    recipe_source,
    refuse_more_workers_than_slices,
)
from disttrain_launch.local.group import module_arguments

if TYPE_CHECKING:
    from disttrain_launch.nodes.node import Node


@click.command()
@click.argument("recipe", required=False, type=RECIPE)
@num_workers_option
@click.option(
    "--run-dir", callback=run_dir_callback, metavar="DIR|URL", help="Where the run lives: the same on all machines."
)
@overrides_option
@trust_option
@node_options
@max_restarts_option
@max_losses_option
@dry_run_option
def node(
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
    """Run this machine's part of training RECIPE on several machines; start it on each.

    Exits with the workers' own code. `disttrain train --nodes` does the same.
    """
    run_node(
        recipe,
        num_workers,
        run_dir,
        overrides,
        NodeOptions(**options),
        max_restarts,
        max_losses,
        dry_run=dry_run,
        trust=trust,
    )


def run_node(
    recipe: str | None,
    num_workers: int,
    run_dir: str | None,
    overrides: tuple[str, ...],
    options: NodeOptions,
    max_restarts: int,
    max_losses: int,
    *,
    dry_run: bool,
    trust: bool,
) -> None:
    """Check everything, and become this machine's agent (or print what it would be)."""
    # The agent unblocks them once it can handle them: the first process of a container would not receive them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        planned = _planned(recipe, num_workers, run_dir, overrides, options, max_restarts, max_losses, trust=trust)
        if dry_run:
            click.echo(planned.described())
        else:
            planned.become()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _planned(
    recipe: str | None,
    num_workers: int,
    run_dir: str | None,
    overrides: tuple[str, ...],
    options: NodeOptions,
    max_restarts: int,
    max_losses: int,
    *,
    trust: bool,
) -> Node:
    from disttrain.recipe.continuing import is_led  # not above: `--help` need not wait for pydantic
    from disttrain_launch.nodes.agreement import terms_of

    if run_dir is None:
        raise click.UsageError("--run-dir is missing: machines that join later, or again, must find the run.")
    checked = checked_recipe(recipe, run_dir, overrides, trust=trust)
    mention_old_names(recipe, run_dir, overrides)
    source = recipe_source(recipe, run_dir)
    options_of_workers = ("--run-dir", run_dir, *override_arguments(overrides), *["--trust"] * trust)
    arguments = module_arguments("disttrain", source, *options_of_workers)
    planned = planned_node(arguments, num_workers, run_dir, options, max_restarts, source, overrides)
    planned = dataclasses.replace(
        planned,
        continues=is_led(checked, on_gpus=planned.is_on_gpus),
        terms=terms_of(checked),
        stops=checked.parallel.on_lost_worker == "stop",
        max_losses=max_losses,
        most_workers=checked.parallel.slices if checked.parallel.exact else 0,
    )
    fewest = planned.nodes[0] * planned.workers
    said = f"--nodes {planned.nodes[0]} with -n {num_workers}, at least {fewest} workers"
    refuse_more_workers_than_slices(checked, fewest, said)
    return planned
