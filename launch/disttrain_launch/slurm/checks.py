"""What a job must be before it is sent to Slurm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from disttrain.recipe import Recipe

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")
_MEMORY = re.compile(r"\d+[KMGT]?")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")


def time_limit(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A time as sbatch takes it."""
    if value is not None and not _TIME.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a time; give minutes, H:MM:SS or D-HH:MM:SS.")
    return value


def memory(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """An amount of memory as sbatch takes it."""
    if value is not None and not _MEMORY.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is not an amount of memory; give megabytes, or a number with K, M, G or T."
        )
    return value


def job_name(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A name that file names may hold."""
    if value is not None and not _NAME.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a valid name; use letters, digits and _ . + -")
    return value


def directives(
    _ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """`--sbatch NAME=VALUE` as pairs."""
    pairs = []
    for text in values:
        name, separator, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or (separator and not value) or "\n" in value:
            raise click.BadParameter(f"{text!r} is not an option of sbatch; give NAME=VALUE, without the dashes.")
        pairs.append((name, value))
    return tuple(pairs)


def sweep(
    _ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`--sweep KEY=VALUE,VALUE` as keys with their values."""
    axes = []
    for text in values:
        key, separator, listed = text.partition("=")
        each = tuple(value.strip() for value in listed.split(","))
        if not key or not separator or not all(each) or len(set(each)) < len(each):
            raise click.BadParameter(f"{text!r} is not a sweep; give KEY=VALUE,VALUE,… with values that differ.")
        axes.append((key, each))
    if len({key for key, _ in axes}) < len(axes):
        raise click.BadParameter("a key is swept twice; name each once.")
    return tuple(axes)


def check_times(warn_s: int, grace_s: int) -> None:
    """Refuse a warning that leaves no time to save."""
    if grace_s >= warn_s:
        raise click.UsageError(
            f"--stop-grace {grace_s} is not shorter than --warn {warn_s}: Slurm would kill the job while it saves. "
            "Raise --warn, or lower --stop-grace."
        )


def check_slices(recipe: Recipe, nodes: int, workers: str) -> None:
    """Refuse more workers than can share a step in exact mode, where their number is known."""
    from disttrain_launch.cli.recipe_source import refuse_more_workers_than_slices

    per_node = int(workers) if workers.isdigit() else 1
    refuse_more_workers_than_slices(recipe, nodes * per_node, f"--nodes {nodes} with -n {workers}")
