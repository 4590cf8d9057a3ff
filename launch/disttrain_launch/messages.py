"""What the launcher says to its user."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import click


def complain(message: str) -> None:
    """Say what went wrong, on standard error."""
    for line in message.splitlines():
        say(f"disttrain: {line}", err=True)


def say(text: str, *, err: bool = False) -> None:
    """Print `text`, if somebody can be reached: a terminal that is gone, or a full disk, must not end a job."""
    with suppress(OSError, ValueError):
        click.echo(text, err=err)


def have_standard_streams() -> None:
    """Open the standard streams that this process was started without (`>&-`), so that nothing else takes their place.

    They lead nowhere. As disttrain.output has it for workers.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process runs
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
