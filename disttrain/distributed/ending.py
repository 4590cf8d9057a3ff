"""How workers end: the report that one leaves, what caused what, and the words for it. For launchers too: no torch."""

from __future__ import annotations

import signal
import socket
import time
from dataclasses import dataclass

from disttrain.errors import ExitCode


@dataclass(frozen=True)
class Report:
    """What a failing worker wrote to its error file.

    Args:
        message: for the user.
        host: where the worker ran.
        time: when it failed, in seconds since 1970.
        traceback: of an unexpected failure.
        is_consequence: whether the worker itself takes it for another one's failure, as a lost connection is.
        is_agreed: whether all workers fail alike, by a decision of rank 0, so that no single rank is the cause.
    """

    message: str
    host: str
    time: float
    traceback: str | None
    is_consequence: bool = False
    is_agreed: bool = False

    @classmethod
    def of(cls, fields: object) -> Report | None:
        """The report of a failure in the content of an error file; None if there is none."""
        if not isinstance(fields, dict) or says_finished(fields) or "exit_code" not in fields:
            return None
        try:
            return cls(
                message=str(fields["message"]).strip(),
                host=str(fields.get("host") or socket.gethostname()),
                time=float(fields["time"]),
                traceback=fields.get("traceback"),
                is_consequence=fields.get("consequence") is True,
                is_agreed=fields.get("is_agreed") is True,
            )
        except (ValueError, TypeError, KeyError):
            return None


def says_finished(fields: object) -> bool:
    """Whether this content of an error file says that the worker did what it was started for."""
    return isinstance(fields, dict) and fields.get("exit_code") == ExitCode.DONE


def left_early() -> Report:
    """The report for a worker that exited with 0 but did not say that it had finished."""
    message = "exited with code 0 before its work was done: code that it runs called os._exit(0)"
    return Report(message, socket.gethostname(), time.time(), None)


@dataclass(frozen=True)
class Ending:
    """How one worker ended.

    Args:
        rank: whose end it was.
        code: the exit code; -N: killed by signal N.
        time: when it was noticed, in seconds since 1970.
        report: what it reported.
    """

    rank: int
    code: int
    time: float
    report: Report | None

    @property
    def is_explained(self) -> bool:
        """Whether it failed for a reason that it gives to the user."""
        return self.report is not None and ExitCode.explains(self.code)

    @property
    def is_common(self) -> bool:
        """Whether it is the end of all workers alike, and says so."""
        return self.report is not None and (self.report.is_agreed or ExitCode.is_common(self.code))

    @property
    def order(self) -> tuple[int, float]:
        """Sorts causes before consequences.

        An explained failure is never a consequence, and neither is a signal from outside; an abort may be either, and
        there the clock decides; a lost connection comes last.
        """
        killed_from_outside = self.code < 0 and self.code != -signal.SIGABRT
        is_consequence = self.report is not None and self.report.is_consequence
        return (
            0 if self.is_explained else 1 if killed_from_outside else 3 if is_consequence else 2,
            self.report.time if self.report else self.time,
        )

    @property
    def exit_code(self) -> int:
        """What it makes of the job, if it was the cause."""
        return self.code if self.code > 0 else ExitCode.FAILURE

    @property
    def message(self) -> str:
        """What happened, without who it happened to."""
        if self.code < 0:
            why = " (usually because the machine ran out of memory)" if self.code == -signal.SIGKILL else ""
            return f"was killed by {_signal_name(-self.code)}{why}"
        return self.report.message if self.report else f"exited with code {self.code} without giving a reason"

    def told(self, host: str | None = None) -> str:
        """The message with the rank and the host it happened to; `host` is that of one that left no report."""
        where = self.report.host if self.report else host or socket.gethostname()
        return f"rank {self.rank} on {where}{': ' if self.report and self.code > 0 else ' '}{self.message}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
