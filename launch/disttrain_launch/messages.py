"""What the launcher says to its user."""

from __future__ import annotations

import click


def complain(message: str) -> None:
    """Say what went wrong, on standard error."""
    for line in message.splitlines():
        click.echo(f"disttrain: {line}", err=True)
