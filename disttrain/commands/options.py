"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from disttrain.distributed.cores import usable_cores
from disttrain.distributed.gpus import OnePerGpu, count_gpus

_Function = TypeVar("_Function", bound=Callable[..., Any])


def most_workers() -> int:
    """More workers than this on one machine are a typo: each one holds its own copy of torch."""
    return max(64, 16 * usable_cores())


def _num_workers(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """The number that `value` asks for: itself, `gpu` for one per GPU, `auto` for one per GPU or else one."""
    if value == "auto":
        return count_gpus() or 1
    if value == "gpu":
        count = count_gpus()
        if not count:
            raise click.BadParameter(
                "no NVIDIA GPU is visible on this machine; give a number of workers.", ctx, parameter
            )
        return OnePerGpu(count)
    try:
        count = int(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a valid number of workers; give a whole number, gpu or auto.", ctx, parameter
        ) from None
    if count < 1:
        raise click.BadParameter(f"{count} workers cannot train; give 1 or more.", ctx, parameter)
    if count > most_workers():
        raise click.BadParameter(
            f"{count} workers are too many for {usable_cores()} cores; give at most {most_workers()}.", ctx, parameter
        )
    return count


def num_workers_option(function: _Function) -> _Function:
    """`-n`, passed as `num_workers`."""
    return click.option(
        "-n",
        "--num-workers",
        metavar="N|gpu|auto",
        callback=_num_workers,
        default="1",
        show_default=True,
        help="Worker processes on this machine: a number, gpu (one per GPU), or auto (one per GPU, else one).",
    )(function)


def overrides_option(function: _Function) -> _Function:
    """`-o`, passed as `overrides`."""
    return click.option(
        "-o",
        "--override",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a key of the recipe, as in -o optim.lr=0.1. May be given several times.",
    )(function)


def json_option(function: _Function) -> _Function:
    """`--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(function)


def trust_option(function: _Function) -> _Function:
    """`--trust`."""
    return click.option(
        "--trust", is_flag=True, help="Import the code that the run itself names, and use the server it names."
    )(function)


def raw_option(function: _Function) -> _Function:
    """`--raw`."""
    return click.option("--raw", is_flag=True, help="Use the raw weights, not their moving average.")(function)


def max_restarts_option(function: _Function) -> _Function:
    """`--max-restarts`."""
    return click.option(
        "--max-restarts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Restart the workers at most this many times after failures that are worth a retry.",
    )(function)


def max_losses_option(function: _Function) -> _Function:
    """`--max-losses`."""
    return click.option(
        "--max-losses",
        type=click.IntRange(min=0),
        default=10,
        show_default=True,
        help="Continue without lost workers (parallel.on_lost_worker) at most this many times within ten minutes.",
    )(function)


def dry_run_option(function: _Function) -> _Function:
    """`--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Print what would be run, and run nothing.")(function)


def override_arguments(overrides: tuple[str, ...]) -> list[str]:
    """The overrides as they stand on a worker's command line."""
    return [word for override in overrides for word in ("-o", override)]
