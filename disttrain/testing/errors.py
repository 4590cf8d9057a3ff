"""How a multi-process test fails."""

from __future__ import annotations


class WorkerFailed(Exception):
    """A worker raised, or died.

    The message names the rank, holds its traceback, and shows what the other ranks were doing. `rank` is the first that
    failed, `cause` the exception it raised (None if it died, or if the exception could not be pickled).
    """

    def __init__(self, message: str, rank: int, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause


class WorkerTimeout(WorkerFailed):
    """The workers were not done in time, or never could be. The message has every rank's stack and collective."""


class CollectivesDiffer(WorkerFailed):
    """Every rank finished, but they did not call the same collectives: a bug that another day shows as a hang."""


class HarnessError(Exception):
    """The harness itself could not do what was asked: the message says why, and what to do."""


def is_whole(value: object) -> bool:
    """Whether an argument is a number without fractions; True is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def wrong(message: str, right_type: bool) -> TypeError | ValueError:
    """The exception for an argument that cannot be: of the wrong type, or of the right one with a wrong value."""
    return ValueError(message) if right_type else TypeError(message)
