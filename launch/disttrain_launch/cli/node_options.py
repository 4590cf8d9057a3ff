"""The options for several machines, and what they come to on this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from disttrain_launch.nodes.node import Node

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class NodeOptions:
    """The options for several machines, as they stand on the command line."""

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
            click.option("--nodes", metavar="N|MIN:MAX", help="Number of machines, or the fewest and the most."),
            click.option(
                "--rendezvous", metavar="HOST:PORT", help="Where the machines meet: the address of one of them."
            ),
            click.option(
                "--job-id", default="disttrain", show_default=True, help="A name that all machines of a job share."
            ),
            click.option(
                "--node-rank",
                type=click.IntRange(min=0),
                help="0 on the machine that HOST names, any other elsewhere (left out: detected).",
            ),
            click.option(
                "--local-addr", metavar="ADDRESS", help="The address by which the other machines reach this one."
            ),
            click.option(
                "--stop-grace",
                type=click.IntRange(min=1),
                default=120,
                show_default=True,
                help="Seconds that workers have to save when asked to stop.",
            ),
        )
    ):
        function = option(function)
    return function


def planned_node(
    arguments: tuple[str, ...],
    num_workers: int,
    run_dir: str,
    options: NodeOptions,
    max_restarts: int,
    recipe: str,
    overrides: tuple[str, ...],
) -> Node:
    """What the options come to on this machine. Raises click.UsageError or ConfigurationError."""
    from disttrain.recipe import ConfigurationError
    from disttrain_launch.nodes.node import Node, address_towards, own_addresses, parse_nodes, parse_rendezvous, resolve

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
    serves = None  # the agent deals with an unknown name: that of a finished run's machine may be gone
    if options.node_rank is not None or found:
        serves = options.node_rank == 0 if options.node_rank is not None else any(one in mine for one in found)
    address = options.local_addr or address_towards(host, port)
    is_loopback = address is not None and (address.startswith("127.") or address == "::1")
    if is_loopback and options.local_addr is None and nodes[1] > 1 and host not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigurationError(
            f"--rendezvous {options.rendezvous}: {host!r} is {address} here, which no other machine can reach. Give "
            "the machine's address instead of its name, or --local-addr."
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
        recipe=recipe,
        overrides=overrides,
    )
