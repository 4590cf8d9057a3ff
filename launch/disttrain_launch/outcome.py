"""How workers ended, and what that makes of the job: which failure was the cause, and what to say of it."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from disttrain.recipe import ExitCode

_EXPLAINED = (ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.CONFIGURATION)


@dataclass(frozen=True)
class Report:
    """What a failing worker wrote to its error file.

    Args:
        message: for the user.
        host: where the worker ran.
        time: when it failed, in seconds since 1970.
        traceback: of an unexpected failure.
        is_consequence: whether it says so itself that it is mostly somebody else's failure, as a lost connection is.
        is_agreed: whether all workers fail alike, by a decision of rank 0, so that it is no rank's own.
    """

    message: str
    host: str
    time: float
    traceback: str | None
    is_consequence: bool = False
    is_agreed: bool = False


@dataclass(frozen=True)
class Ending:
    """How one worker ended.

    Args:
        rank: whose end it was.
        code: the exit code; -N: killed by signal N.
        time: when it was noticed, in seconds since 1970.
        asked: whether the launcher had asked it to end.
        report: what it had to say.
        log: where all it wrote can be read.
        last_words: the end of what it wrote, where no log has it.
    """

    rank: int
    code: int
    time: float
    asked: bool
    report: Report | None
    log: Path | None
    last_words: str

    @property
    def failed_by_itself(self) -> bool:
        """Whether it failed, and not because the launcher ended it."""
        return self.code not in (ExitCode.DONE, ExitCode.STOPPED) and not (self.asked and self.code < 0)

    @property
    def calls_for_an_end(self) -> bool:
        """Whether the others cannot go on without it."""
        return self.code not in (ExitCode.DONE, ExitCode.STOPPED)

    @property
    def is_explained(self) -> bool:
        """Whether it failed for a reason that it gives to the user."""
        return self.report is not None and self.code in _EXPLAINED

    @property
    def order(self) -> tuple[int, float]:
        """Sorts causes before consequences.

        An explained failure is nobody's consequence, and neither is a signal from outside; an abort may be either, and
        there the clock decides; a lost connection comes last.
        """
        killed_from_outside = self.code < 0 and self.code != -signal.SIGABRT
        is_consequence = self.report is not None and self.report.is_consequence
        return (
            0 if self.is_explained else 1 if killed_from_outside else 3 if is_consequence else 2,
            self.report.time if self.report else self.time,
        )

    @property
    def message(self) -> str:
        """What happened, without who it happened to."""
        if self.report is not None and self.code > 0:
            return self.report.message
        hint = f"; see {self.log}" if self.log else f"; its last words:\n{self.last_words}" if self.last_words else ""
        if self.code > 0:
            return f"exited with code {self.code} without giving a reason{hint}"
        why = " (usually because the machine ran out of memory)" if self.code == -signal.SIGKILL else ""
        return f"was killed by {_signal_name(-self.code)}{why}{hint}"


@dataclass(frozen=True)
class Outcome:
    """The job's exit code, what to tell the user, and the traceback of an unexpected failure."""

    exit_code: int
    message: str = ""
    traceback: str | None = None


def settle(endings: Sequence[Ending], *, stop_requested: bool) -> Outcome:
    """What the endings of all workers make of the job."""
    if stop_requested and any(ending.asked and ending.code == -signal.SIGTERM for ending in endings):
        return Outcome(ExitCode.STOPPED, "stopped before the workers were ready; run the same command again")
    if any(ending.code == ExitCode.UNREAD for ending in endings):
        return Outcome(ExitCode.UNREAD)
    failures = sorted((ending for ending in endings if ending.failed_by_itself), key=lambda ending: ending.order)
    if not failures:
        stopped = [ending for ending in endings if ending.code != ExitCode.DONE]
        words = next((ending.report.message for ending in stopped if ending.report), "")
        return Outcome(ExitCode.STOPPED if stopped else ExitCode.DONE, words)
    cause = failures[0]
    all_say_the_same = len({ending.message for ending in endings}) == 1 and cause.is_explained
    is_nobodys_own = all_say_the_same or (cause.report is not None and cause.report.is_agreed)
    who = "" if is_nobodys_own else f"rank {cause.rank} on {cause.report.host if cause.report else _host()}"
    if len(endings) == 1 and not cause.is_explained:
        who = "" if cause.report else "the worker"
    separator = "" if not who else ": " if cause.report and cause.code > 0 else " "
    return Outcome(
        exit_code=cause.code if cause.code > 0 else ExitCode.FAILURE,
        message=f"{who}{separator}{cause.message}",
        traceback=cause.report.traceback if cause.report else None,
    )


def left_early() -> Report:
    """What to say of a worker that ended with 0 and did not say that it had finished."""
    message = "exited with code 0 before its work was done: code that it runs called os._exit(0)"
    return Report(message, _host(), time.time(), None)


def read_report(file: IO[bytes]) -> Report | None:
    """What the worker wrote to its error file of a failure, if anything that can be read."""
    fields = _read(file)
    if fields.get("exit_code") == ExitCode.DONE:
        return None
    try:
        return Report(
            message=str(fields["message"]).strip(),
            host=str(fields.get("host") or _host()),
            time=float(fields["time"]),
            traceback=fields.get("traceback"),
            is_consequence=fields.get("consequence") is True,
            is_agreed=fields.get("is_agreed") is True,
        )
    except (ValueError, TypeError, KeyError):
        return None


def says_finished(file: IO[bytes]) -> bool:
    """Whether the worker wrote to its error file that it did what it was started for."""
    return _read(file).get("exit_code") == ExitCode.DONE


def _read(file: IO[bytes]) -> dict[str, Any]:
    file.seek(0)
    try:
        fields = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _host() -> str:
    return socket.gethostname()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
