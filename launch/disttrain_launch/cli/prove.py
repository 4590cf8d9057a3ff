"""`disttrain prove`."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from disttrain.commands.arguments import RECIPE
from disttrain.commands.options import json_option, most_workers, override_arguments, overrides_option

if TYPE_CHECKING:
    from disttrain.recipe import Recipe

_DEFAULT_WORKERS = (1, 2, 3, 4)
_STRATEGIES = ("ddp", "fsdp")
_DEFAULT_STEPS = 100


def _worker_counts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        counts = tuple(dict.fromkeys(int(word) for word in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} should be numbers with commas, as in 1,2,4.", ctx, parameter) from None
    if min(counts) < 1 or max(counts) > most_workers():
        raise click.BadParameter(f"give numbers between 1 and {most_workers()}.", ctx, parameter)
    return counts


def _strategies(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(value.split(",")) if value is not None else ()
    for name in names:
        if name not in _STRATEGIES:
            raise click.BadParameter(f"{name!r} should be one of {', '.join(_STRATEGIES)}.", ctx, parameter)
    return names


@click.command()
@click.argument("recipe", type=RECIPE)
@click.option(
    "--workers",
    metavar="N,N,...",
    callback=_worker_counts,
    help="Numbers of workers to start and to resume with. [default: 1,2,3,4; fast mode: 2]",
)
@click.option(
    "--strategy",
    "strategies",
    metavar="NAME,NAME,...",
    callback=_strategies,
    help="Strategies that the starts of a disturbed run take in turn: ddp, fsdp. [default: the recipe's]",
)
@click.option(
    "--kills",
    type=click.IntRange(min=0),
    help="SIGKILLs per disturbed run that end it, to be started again. [default: 5; with --lose: 0]",
)
@click.option(
    "--lose",
    "losses",
    type=click.IntRange(min=0),
    default=0,
    help="SIGKILLs per disturbed run to single workers, while the others continue without them. [default: 0]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Train this many steps at most. [default: 100; with --lose: as many more as the losses take]",
)
@click.option("--seed", type=int, help="Draw the moments and the victims from this seed. [default: another each time]")
@overrides_option
@json_option
def prove(
    recipe: str,
    workers: tuple[int, ...] | None,
    strategies: tuple[str, ...],
    kills: int | None,
    losses: int,
    steps: int | None,
    seed: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show that kills, restarts and the number of workers leave no trace in a single bit of RECIPE's result.

    Trains undisturbed once, then once for each number of workers with SIGKILLs at random moments (to a worker, the
    launcher or all) and restarts with other numbers, and compares weights, optimizer and losses. With --lose, single
    workers are killed while the others continue without them (parallel.on_lost_worker). Exit code 0 only if all are the
    same, each run had such losses, and none of them has restarted it. A recipe in fast mode is proven in exact mode,
    unless one number of workers is asked for.
    """
    from disttrain_launch.prove.proof import Proof
    from disttrain_launch.prove.report import as_table, is_proven

    kills = kills if kills is not None else 0 if losses else 5
    if losses:
        overrides = _refuse_what_cannot_lose(workers, strategies, overrides)
    asked, extensible, given = overrides, losses > 0 and steps is None, workers
    steps = steps or _DEFAULT_STEPS
    checked, workers, overrides = _settled(recipe, given, strategies, asked, steps, loses=losses > 0)
    random.seed(seed)

    def with_steps(steps: int) -> list[str]:
        longer = (*asked, "train.epochs=1000000", f"train.max_steps={steps}")
        return [recipe, *override_arguments(_settled(recipe, given, strategies, longer, steps, loses=True)[2])]

    _clean_up_on_sigterm()
    folder = Path(tempfile.mkdtemp(prefix="disttrain-prove-"))
    say = _silent if as_json else _progress
    say(_intention(checked, workers, kills, losses, steps))
    proven = None
    try:
        proof = Proof(
            folder,
            [recipe, *override_arguments(overrides)],
            workers,
            kills,
            say,
            strategies,
            losses=losses,
            with_steps=with_steps if extensible else None,
        )
        result = proof.carry_out()
        proven = is_proven(result)
    finally:
        if proven is not False:
            shutil.rmtree(folder, ignore_errors=True)
    result = {**result, "recipe": checked.name, "exact": checked.parallel.exact}
    click.echo(json.dumps(result) if as_json else as_table(result))
    if not proven and not as_json:
        click.echo(f"The runs are kept in {folder}")
    sys.exit(0 if proven else 1)


def _settled(
    recipe: str,
    workers: tuple[int, ...] | None,
    strategies: tuple[str, ...],
    overrides: tuple[str, ...],
    steps: int,
    *,
    loses: bool,
) -> tuple[Recipe, tuple[int, ...], tuple[str, ...]]:
    """The recipe as it will be proven, the numbers of workers, and the overrides that make it so."""
    from disttrain.recipe import ConfigurationError, check_installed, load_recipe
    from disttrain.recipe.continuing import why_losses_restart

    asked = load_recipe(recipe, overrides)
    fast_on_purpose = "exact" in asked.parallel.model_fields_set and not asked.parallel.exact
    if fast_on_purpose and workers is None:
        workers = (2,)
    default = (min(asked.parallel.slices, _DEFAULT_WORKERS[-1]),) if loses else _DEFAULT_WORKERS
    workers = workers or tuple(count for count in default if count <= asked.parallel.slices)
    if fast_on_purpose and len(workers) > 1:
        raise click.UsageError(
            "parallel.exact is false, and fast mode gives the same bits at one number of workers only: "
            f"give one, as in --workers {workers[0]}, or set parallel.exact = true."
        )
    if fast_on_purpose and strategies:
        raise click.UsageError(
            "parallel.exact is false, and in fast mode strategies round differently: leave out --strategy, or set "
            "parallel.exact = true."
        )
    if not asked.parallel.exact and (len(workers) > 1 or strategies):
        overrides = (*overrides, "parallel.exact=true")
    total = min(steps, asked.train.max_steps or steps)
    every = max(1, total // 10)
    settled = (
        "checkpoint.every_seconds=0",
        f"checkpoint.every_steps={every}",
        "checkpoint.keep_last=1000000",
        "checkpoint.keep_best=0",
        *overrides,
        f"train.max_steps={total}",
        f"parallel.on_lost_worker={'continue' if loses else 'restart'}",
        "train.log_every_steps=1",
        "tracking.uri=none",
        "tracking.system_metrics=false",
        "tracking.log_model=false",
    )
    checked = load_recipe(recipe, settled)
    if loses and not checked.parallel.exact:
        raise click.UsageError(
            "--lose: only exact mode has the same bits without a lost worker; leave out -o parallel.exact=false."
        )
    why = why_losses_restart(checked) if loses else None
    if why is not None:
        raise ConfigurationError(f"--lose: this recipe cannot continue without a lost worker: {why}")
    check_installed(checked)
    if checked.parallel.exact and max(workers) > checked.parallel.slices:
        raise ConfigurationError(
            f"--workers {max(workers)}: in exact mode a step is shared by at most parallel.slices = "
            f"{checked.parallel.slices} workers. Give fewer workers, or more slices: -o parallel.slices={max(workers)}"
        )
    return checked, workers, settled


def _refuse_what_cannot_lose(
    workers: tuple[int, ...] | None, strategies: tuple[str, ...], overrides: tuple[str, ...]
) -> tuple[str, ...]:
    """The overrides with exact mode, in which alone a run continues without a lost worker."""
    if workers is not None and min(workers) < 2:
        raise click.UsageError("--lose: a run of one worker has none to lose; give --workers 2 or more.")
    if "fsdp" in strategies:
        raise click.UsageError("--lose: a lost shard has no copy, so a run with fsdp restarts; leave out --strategy.")
    return ("parallel.exact=true", *overrides)


def _intention(recipe: Recipe, workers: tuple[int, ...], kills: int, losses: int, steps: int) -> str:
    from disttrain_launch.prove.report import counted

    counts = ", ".join(map(str, workers))
    if recipe.parallel.exact:
        mode = f"exact mode, {recipe.parallel.slices} slices"
    else:
        mode = "fast mode, which promises the same bits at one number of workers only"
    lost = [counted(losses, "lost worker")] * (losses > 0)
    struck = [counted(kills, "kill")] * (kills > 0 or not losses) + lost
    extent = f"{counted(steps, 'step')} at most; {', '.join(struck)} in each disturbed run"
    return f"{recipe.name}: {mode}; workers {counts}; {extent}"


def _clean_up_on_sigterm() -> None:
    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _progress(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    """Print nothing: --json promises one object and nothing else."""
