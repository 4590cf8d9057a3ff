"""What a command takes as RUN or CHECKPOINT: a folder that exists, or a URL."""

from __future__ import annotations

from typing import Any

import click


class RunType(click.Path):
    """A path, which has to exist; or a URL, which is opened by the command itself."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Raises click.BadParameter for a path that does not exist."""
        from disttrain.recipe.address import is_url

        return value if is_url(value) else str(super().convert(value, param, ctx))


RUN = RunType(exists=True)
