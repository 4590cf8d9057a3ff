"""The recipe that a command is about: named, or that of a run to resume; checked before any worker starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from disttrain.layout import RECIPE
from disttrain_launch.messages import complain

if TYPE_CHECKING:
    from disttrain.recipe import Recipe


def recipe_source(recipe: str | None, run_dir: str) -> str:
    """What workers are to read: the recipe that was named, or the one of the run in a folder or behind a URL."""
    return recipe if recipe is not None else f"{run_dir.rstrip('/')}/{RECIPE}"


def checked_recipe(
    recipe: str | None, run_dir: str | None, overrides: tuple[str, ...], *, trust: bool = False
) -> Recipe:
    """The recipe, valid and naming only what is installed. Raises RecipeError or ConfigurationError.

    That of a run is refused if it asks for more than a stranger's may, unless there is `trust`.
    """
    from disttrain.recipe import (
        ConfigurationError,
        ask_before_resuming,
        check_installed,
        load_recipe,
        load_recipe_for,
        recipe_of_checkpoints,
        shipped_recipes,
    )
    from disttrain.recipe.address import is_url

    if recipe is not None:
        checked = load_recipe(recipe, overrides)
        check_installed(checked)
        return checked
    if run_dir is None:
        raise click.UsageError(
            f"Missing argument 'RECIPE'. Give one of {', '.join(shipped_recipes())}, a TOML file, "
            "or the --run-dir of a run to resume."
        )
    has_recipe = is_url(run_dir) or os.path.isfile(os.path.join(run_dir, RECIPE))
    if not has_recipe and recipe_of_checkpoints(Path(run_dir)) is None:
        raise ConfigurationError(
            f"--run-dir {run_dir}: no run to resume (it has no {RECIPE}); give a RECIPE to start one"
        )
    checked = load_recipe_for(recipe_source(None, run_dir), run_dir, overrides)
    if not trust:
        ask_before_resuming(checked, run_dir, overrides)
    return checked


def mention_old_names(recipe: str | None, run_dir: str | None, overrides: tuple[str, ...]) -> None:
    """Say once for a job which keys its valid recipe calls by an old name; a run's own recipe.toml may well."""
    from disttrain.recipe import is_own_recipe, old_names_in

    if recipe is not None and not is_own_recipe(recipe, run_dir):
        for line in old_names_in(recipe, overrides):
            complain(line)


def refuse_more_workers_than_slices(recipe: Recipe, num_workers: int, said: str) -> None:
    """Raise ConfigurationError if so many workers, as `said` on the command line, cannot share a step."""
    from disttrain.recipe import ConfigurationError

    if recipe.parallel.exact and num_workers > recipe.parallel.slices:
        raise ConfigurationError(
            f"{said}: in exact mode a step is shared by at most parallel.slices = {recipe.parallel.slices} "
            "workers. Start fewer, or begin a new run with more slices."
        )
