"""What a command takes as RUN, CHECKPOINT, RECIPE or --run-dir: a path (`~`: the home folder) or a URL.

A path that begins with a dash, given behind `--`, is passed on in a form that cannot be taken for an option.
"""

from __future__ import annotations

import os
from typing import Any

import click


class RunType(click.Path):
    """A path, which has to exist; or a URL, which is opened by the command itself."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises click.BadParameter for a path that does not exist."""
        from disttrain.recipe.address import is_url

        return value if is_url(value) else str(super().convert(_no_option(os.path.expanduser(value)), param, ctx))


class RecipeType(click.types.StringParamType):
    """A shipped recipe's name, a path or a URL."""

    name = "recipe"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Leaves further checks to `load_recipe`. Raises RecipeError for a pipe from which no recipe comes."""
        from disttrain.recipe.once import read_once

        recipe = _no_option(str(value))
        read_once(recipe)
        return recipe


def _no_option(path: str) -> str:
    return f"./{path}" if path.startswith("-") and path != "-" else path


def run_dir_callback(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A --run-dir as it holds wherever a process goes: an absolute path, or a URL. Raises ConfigurationError."""
    from disttrain.recipe.address import settled

    return None if value is None else settled(value)


RUN, RECIPE = RunType(exists=True), RecipeType()
