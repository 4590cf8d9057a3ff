"""How workers ended, and what follows for the job: which failure was the cause, and how to report it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from disttrain.distributed.ending import Ending
from disttrain.errors import ExitCode
from disttrain.files import parse_json


@dataclass(frozen=True)
class LocalEnding(Ending):
    """How one worker of this machine ended.

    Args:
        asked: whether the launcher had asked it to end.
        log: where all it wrote can be read.
        last_words: the end of what it wrote, where no log has it.
        host: that of the worker, if it is not this one.
        is_of_lost_machine: whether nobody knows more of it than that its machine is lost.
    """

    asked: bool
    log: Path | None
    last_words: str
    host: str | None = None
    is_of_lost_machine: bool = False

    def told(self, host: str | None = None) -> str:
        """The message with the rank and the host it happened to."""
        return super().told(host or self.host)

    @property
    def failed_by_itself(self) -> bool:
        """Whether it failed, and not because the launcher ended it."""
        return self.calls_for_an_end and not (self.asked and self.code < 0)

    @property
    def calls_for_an_end(self) -> bool:
        """Whether the others cannot continue without it."""
        return not ExitCode.is_safe(self.code)

    @property
    def message(self) -> str:
        """What happened, without who it happened to, and where to read more if it left no report."""
        if self.report is not None and self.code > 0:
            return super().message
        hint = f"; see {self.log}" if self.log else f"; its last words:\n{self.last_words}" if self.last_words else ""
        return f"{super().message}{hint}"


@dataclass(frozen=True)
class Outcome:
    """The job's exit code, the message for the user, and the traceback of an unexpected failure.

    `is_loss`: the cause is a worker that was killed by a signal, or whose machine is lost.
    """

    exit_code: int
    message: str = ""
    traceback: str | None = None
    is_loss: bool = False


def settle(endings: Sequence[LocalEnding], *, stop_requested: bool, is_only_worker: bool = False) -> Outcome:
    """What the endings of all workers mean for the job. One that `is_only_worker` needs no rank to be known by."""
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
    is_common = all_say_the_same or (cause.report is not None and cause.report.is_agreed)
    if is_only_worker and not cause.is_explained:
        message = cause.message if cause.report else f"the worker {cause.message}"
    else:
        message = cause.message if is_common else cause.told()
    traceback = cause.report.traceback if cause.report else None
    return Outcome(cause.exit_code, message, traceback, is_loss=cause.code < 0 or cause.is_of_lost_machine)


def content_of(error_file: IO[bytes]) -> object:
    """What a worker wrote to its error file; None for what cannot be read."""
    return parsed(written_to(error_file))


def written_to(error_file: IO[bytes]) -> bytes:
    """All of the file."""
    error_file.seek(0)
    return error_file.read()


def parsed(content: bytes) -> object:
    """What is written there in JSON; None for what cannot be read."""
    try:
        return parse_json(content)
    except ValueError:
        return None
