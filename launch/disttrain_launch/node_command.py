"""`disttrain node`, and `disttrain train --nodes`: this machine's part of a job on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from disttrain_launch.options import num_workers_option, override_arguments, overrides_option

if TYPE_CHECKING:
    from disttrain.recipe import Recipe
    from disttrain_launch.node import Node

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class NodeOptions:
    """What a user says of several machines, as it stands on the command line."""

    nodes: str | None
    rendezvous: str | None
    job_id: str
    node_rank: int | None
    local_addr: str | None
    stop_grace: int


def node_options(function: _Function) -> _Function:
    """`--nodes` and what belongs to it; passed as the fields of NodeOptions."""
    for option in reversed(
        (
            click.option("--nodes", metavar="N|MIN:MAX", help="Machines that take part; as many as come from MIN to MAX."),
            click.option("--rendezvous", metavar="HOST:PORT", help="Where the machines meet: the address of one of them."),
            click.option("--job-id", default="disttrain", show_default=True, help="The same on all machines of a job."),
            click.option(
                "--node-rank",
                type=click.IntRange(min=0),
                help="0 on the machine that HOST names, any other elsewhere (left out: found out).",
            ),
            click.option("--local-addr", metavar="ADDRESS", help="By which the other machines reach this one."),
            click.option(
                "--stop-grace",
                type=click.IntRange(min=1),
                default=120,
                show_default=True,
                help="Seconds that workers which are asked to stop may take to save.",
            ),
        )
    ):
        function = option(function)
    return function


def max_restarts_option(function: _Function) -> _Function:
    """`--max-restarts`."""
    return click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Start the workers again so often after failures that are worth a retry.",
    )(function)


def dry_run_option(function: _Function) -> _Function:
    """`--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Print what would be run, and run nothing.")(function)


@click.command(short_help="Run one machine's part of a job on several.")
@click.argument("recipe", required=False)
@num_workers_option
@click.option("--run-dir", help="Where the run lives: the same on all machines.")
@overrides_option
@node_options
@max_restarts_option
@dry_run_option
def node(
    recipe: str | None,
    num_workers: int,
    run_dir: str | None,
    overrides: tuple[str, ...],
    max_restarts: int,
    dry_run: bool,
    **options: Any,
) -> None:
    """Run this machine's part of training RECIPE on several machines; to be started on each.

    Exits with the workers' own code. `disttrain train --nodes` comes to the same.
    """
    run_node(recipe, num_workers, run_dir, overrides, NodeOptions(**options), max_restarts, dry_run=dry_run)


def run_node(
    recipe: str | None,
    num_workers: int,
    run_dir: str | None,
    overrides: tuple[str, ...],
    options: NodeOptions,
    max_restarts: int,
    *,
    dry_run: bool,
) -> None:
    """Check everything, and become this machine's agent (or say what it would be)."""
    from disttrain_launch.train_command import checked_recipe, recipe_source

    if run_dir is None:
        raise click.UsageError("--run-dir is missing: machines that come later, or again, must find the run.")
    checked = checked_recipe(recipe, run_dir, overrides)
    arguments = ("-m", "disttrain", recipe_source(recipe, run_dir), "--run-dir", run_dir)
    planned = planned_node((*arguments, *override_arguments(overrides)), num_workers, run_dir, options, max_restarts)
    _refuse_too_few_shards(checked, planned)
    if dry_run:
        click.echo(planned.described())
        return
    planned.become()


def planned_node(
    arguments: tuple[str, ...], num_workers: int, run_dir: str, options: NodeOptions, max_restarts: int
) -> Node:
    """What the options come to on this machine. Raises click.UsageError or ConfigurationError."""
    from disttrain.recipe import ConfigurationError
    from disttrain_launch.node import Node, address_towards, own_addresses, parse_nodes, parse_rendezvous, resolve

    if options.nodes is None or options.rendezvous is None:
        raise click.UsageError("--nodes and --rendezvous belong together: how many machines, and where they meet.")
    try:
        nodes = parse_nodes(options.nodes)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--nodes'") from None
    try:
        host, port = parse_rendezvous(options.rendezvous)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--rendezvous'") from None
    found, mine = resolve(host), own_addresses()
    if options.node_rank is None and not found:
        raise ConfigurationError(
            f"--rendezvous {options.rendezvous}: the name {host!r} does not resolve here, so that nobody can tell which "
            "machine it is. Give an address, or --node-rank."
        )
    serves = options.node_rank == 0 if options.node_rank is not None else any(one in mine for one in found)
    address = options.local_addr or address_towards(host, port)
    is_loopback = address is not None and (address.startswith("127.") or address == "::1")
    if is_loopback and options.local_addr is None and nodes[1] > 1 and host not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigurationError(
            f"--rendezvous {options.rendezvous}: {host!r} is {address} here, which no other machine can reach. Give the "
            "machine's address instead of its name, or --local-addr."
        )
    return Node(
        arguments=arguments,
        nodes=nodes,
        host=host,
        port=port,
        workers=num_workers,
        run_dir=run_dir,
        serves=serves,
        address=address,
        max_restarts=max_restarts,
        job_id=options.job_id,
        grace_s=options.stop_grace,
    )


def _refuse_too_few_shards(recipe: Recipe, planned: Node) -> None:
    from disttrain.recipe import ConfigurationError

    fewest = planned.nodes[0] * planned.workers
    if recipe.parallel.exact and fewest > recipe.parallel.shards:
        raise ConfigurationError(
            f"--nodes {planned.nodes[0]} with -n {planned.workers} are at least {fewest} workers, and in exact mode a "
            f"step is shared by at most parallel.shards = {recipe.parallel.shards}. Start fewer, or begin a new run with "
            "more shards."
        )
