"""`disttrain train`."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain_launch.options import num_workers_option, override_arguments, overrides_option

if TYPE_CHECKING:
    from disttrain.recipe import Recipe


# What a first start leaves that was killed before it had a recipe.
_OF_A_KILLED_START = {"logs", ".lock", ".recipe.toml.writing"}


@click.command(short_help="Train a recipe, or go on with a run.")
@click.argument("recipe", required=False)
@num_workers_option
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Where the run lives (default: runs/RECIPE-TIME). Give a run's own folder to go on with it.",
)
@overrides_option
def train(recipe: str | None, num_workers: int, run_dir: Path | None, overrides: tuple[str, ...]) -> None:
    """Train RECIPE, a shipped one (see `disttrain recipe list`) or a TOML file.

    Started again with the same --run-dir, a run goes on from its newest checkpoint; RECIPE may then be left out.
    """
    from disttrain_launch.group import WorkerGroup
    from disttrain_launch.local import run_workers

    checked = _checked_recipe(recipe, run_dir, overrides)
    _refuse_more_workers_than_shards(checked, num_workers)
    run_dir = _opened(run_dir) if run_dir is not None else _made(checked)
    source = recipe if recipe is not None else str(run_dir / "recipe.toml")
    arguments = ("-m", "disttrain", source, "--run-dir", str(run_dir), *override_arguments(overrides))
    run_workers(WorkerGroup(arguments, num_workers, log_dir=run_dir / "logs"))


def _checked_recipe(recipe: str | None, run_dir: Path | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to train, checked before any worker starts."""
    from disttrain.recipe import ConfigurationError, check_installed, load_recipe, shipped_recipes

    if recipe is not None:
        checked = load_recipe(recipe, overrides)
        check_installed(checked)
        return checked
    if run_dir is None:
        raise click.UsageError(
            f"Missing argument 'RECIPE'. Give one of {', '.join(shipped_recipes())}, a TOML file, "
            "or the --run-dir of a run to go on with."
        )
    if not os.path.isfile(run_dir / "recipe.toml"):  # False also for names that no file can have
        raise ConfigurationError(
            f"--run-dir {run_dir}: no run to go on with (it has no recipe.toml); give a RECIPE to begin one"
        )
    return load_recipe(str(run_dir / "recipe.toml"), overrides)


def _refuse_more_workers_than_shards(recipe: Recipe, num_workers: int) -> None:
    from disttrain.recipe import ConfigurationError

    if recipe.parallel.exact and num_workers > recipe.parallel.shards:
        raise ConfigurationError(
            f"-n {num_workers}: in exact mode a step is shared by at most parallel.shards = {recipe.parallel.shards} "
            "workers. Start fewer, or begin a new run with more shards."
        )


def _opened(run_dir: Path) -> Path:
    """The run directory, with its folder for logs; one that holds something else is left alone."""
    from disttrain.recipe import ConfigurationError

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in run_dir.iterdir()}
        if "recipe.toml" not in names and names - _OF_A_KILLED_START:
            raise ConfigurationError(
                f"--run-dir {run_dir}: is not empty and not a run directory (it has no recipe.toml); give another one"
            )
        (run_dir / "logs").mkdir(exist_ok=True)
    except FileExistsError as error:
        raise ConfigurationError(f"--run-dir {run_dir}: {error.filename} is a file; give a folder") from None
    except OSError as error:
        raise ConfigurationError(f"--run-dir {run_dir}: {error.strerror}; give another one") from None
    except RecursionError:
        raise ConfigurationError(f"--run-dir: {len(run_dir.parts)} folders within each other; give fewer") from None
    return run_dir


def _made(recipe: Recipe) -> Path:
    """A new run directory under ./runs; two runs that begin in the same second get two."""
    stem = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 100))):
        try:
            Path("runs", name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # _opened says what is wrong
        return _opened(Path("runs", name))
    raise AssertionError(f"a hundred runs called {stem}")
