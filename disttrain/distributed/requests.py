"""Requests to stop, as both kinds of launcher take them and speak of them. No torch."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a launcher, and through it its workers, to save and stop."""
SAME_REQUEST_S = 1.0
"""`timeout` and `uv run` pass on a signal that reached the launcher already: within this time it is one request."""


def heard_requests() -> list[signal.Signals]:
    """The signals to take for requests: under `nohup`, SIGHUP stays ignored."""
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def name_of(number: int) -> str:
    """A signal's name, as the person who sends it calls it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def asking(number: int) -> str:
    """What a launcher says when this signal has asked it to stop."""
    return f"{name_of(number)}: asking the workers to save and stop; press Ctrl-C again to kill them"
