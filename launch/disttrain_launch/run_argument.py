"""What a command takes as RUN, CHECKPOINT or --run-dir: a folder, in which `~` is the home folder, or a URL."""

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

        return value if is_url(value) else str(super().convert(os.path.expanduser(value), param, ctx))


def run_dir_callback(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A --run-dir as it holds wherever a process goes: an absolute path, or a URL. Raises ConfigurationError."""
    from disttrain.recipe.address import settled

    return None if value is None else settled(value)


RUN = RunType(exists=True)
