"""The launcher's messages to its user."""

from __future__ import annotations

from contextlib import suppress

import click


def complain(message: str) -> None:
    """Report what went wrong, on standard error."""
    from disttrain.recipe import printable  # not above: `--help` does without

    for line in printable(message).splitlines():
        say(f"disttrain: {line}", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print `text`, if it can be printed: a terminal that is gone, or a full disk, must not end a job."""
    with suppress(OSError, ValueError):
        click.echo(text, err=err)
