"""Failures a user can cause, and the exit code by which a launcher decides what to do about each."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import ClassVar

# What is installed, what is ours, and Python's own library, through which a mistake of the user's may surface.
_NOT_THE_USERS = re.compile(
    r"^<|[/\\](site|dist)-packages[/\\]|"
    + "|".join(f"^{re.escape(os.path.dirname(file) + os.sep)}" for file in (__file__, os.__file__))
)

# What gloo, NCCL and the store report when a peer has gone: mostly the consequence of another rank's failure.
_A_PEER_HAS_GONE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|Socket closed|failed to recv|wait timeout"
    r"|Application timeout caused pair closure|remote process exited|connectFullMesh failed",
    re.IGNORECASE,
)

# What torch raises besides its OutOfMemoryError, which is that of its own allocator of a GPU's memory.
_NO_MEMORY = re.compile(r"can't allocate memory|CUDA error: out of memory|STATUS_ALLOC_FAILED")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ExitCode(IntEnum):
    """What a worker's exit code means to its launcher."""

    DONE = 0
    FAILURE = 1  # unexpected, worth a retry
    USAGE = 2  # wrong command line
    DIVERGED = 70  # training diverged, never retry
    LOST = 71  # a worker was lost, and the recipe ends the run then: resume it by hand
    STOPPED = 75  # stopped on request, checkpoint saved, start again
    CONFIGURATION = 78  # wrong recipe, data or environment, never retry
    UNREAD = 141  # the reader of the output is gone; 128 + SIGPIPE, as a shell has it of other programs

    @classmethod
    def explains(cls, code: int) -> bool:
        """Whether a worker that ends so has said why, and would fail again: it is the cause, and no other's victim."""
        return code in (cls.USAGE, cls.DIVERGED, cls.CONFIGURATION)

    @classmethod
    def is_final(cls, code: int) -> bool:
        """Whether starting again does not help, or is not wanted."""
        return cls.explains(code) or code in (cls.DONE, cls.LOST, cls.STOPPED, cls.UNREAD)

    @classmethod
    def is_safe(cls, code: int) -> bool:
        """Whether this is not a failure: the work is done, or saved."""
        return code in (cls.DONE, cls.STOPPED)

    @classmethod
    def is_common(cls, code: int) -> bool:
        """Whether all workers end so at the same step, with the same words."""
        return code in (cls.DIVERGED, cls.STOPPED)


class DisttrainError(Exception):
    """A failure whose message is written for the user: one or two lines on what is wrong, where, and what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILURE
    trace: str | None = None  # the traceback, as text, where the user needs it


class UserCodeError(DisttrainError):
    """An exception out of the user's own code. `trace` is its traceback, which survives process boundaries."""

    def __init__(self, message: str, trace: str | None = None) -> None:
        super().__init__(message)
        self.trace = trace


class TaskError(UserCodeError):
    """An exception out of a user's task, hook or model constructor: made again, the call would raise again.

    The message names what was called and the place in the user's code. Before training no traceback is shown.
    """

    exit_code = ExitCode.CONFIGURATION


class PeerError(DisttrainError):
    """The failure of another worker, which reports it itself, in more detail."""


class AgreedError(DisttrainError):
    """A failure that every rank raises alike, by a decision of rank 0: it belongs to no single rank."""


class UsageError(DisttrainError):
    """The command line asks for something that does not exist."""

    exit_code = ExitCode.USAGE


class DivergedError(DisttrainError):
    """The loss or a gradient is no longer finite."""

    exit_code = ExitCode.DIVERGED


class StoppedError(DisttrainError):
    """The run was asked to stop; it has saved a checkpoint and can be resumed."""

    exit_code = ExitCode.STOPPED


class ConfigurationError(DisttrainError):
    """Data, a checkpoint or the environment does not fit: a retry would fail again."""

    exit_code = ExitCode.CONFIGURATION


class NotImagesError(ConfigurationError):
    """A user's samples are not taken for images with labels, whatever they are."""


class RecipeError(ConfigurationError):
    """The recipe is wrong: each line of the message names one key and what it should be."""


def printable(text: str) -> str:
    """`text`, which came from outside, with its control characters written out, except tabs and ends of lines.

    A terminal would obey them: clear the screen, change its title, put something on the clipboard.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def brief(text: object, limit: int = 200) -> str:
    """`text`, which came from outside, on one line and no longer than a message may be."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[:limit]}…"


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` tells of another worker that has gone, wherever it was raised."""
    return isinstance(error, RuntimeError) and _A_PEER_HAS_GONE.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` tells of memory that is not there, a GPU's or the machine's."""
    is_torchs = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return is_torchs or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def is_circumstance(error: BaseException) -> bool:
    """Whether `error` tells of another worker that has gone or of memory: no fault of the code that it comes out of."""
    return is_lost_peer(error) or is_out_of_memory(error)


def in_digits(value: float, digits: int = 4) -> str:
    """A number for people: with so many significant digits at least, and an exponent only below 1e-4 and above 1e7.

    180,843 and 0.01235, not 1.808e+05. With six digits the exponent begins at 1e9.
    """
    is_whole = 10 ** (digits - 1) - 0.5 <= abs(value) < 10 ** (digits + 3)
    return f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"


def failure_in(what: str, error: Exception) -> UserCodeError:
    """The failure `error` of the user's own code, while it did `what`, with the place in that code."""
    message = f"{what}: {type(error).__name__}: {brief(error)} ({where(error)})"
    return UserCodeError(message, "".join(traceback.format_exception(error)))


def failure_of(method: str, error: Exception) -> TaskError:
    """The failure `error` of a `method` of the user's task, with the place in that code."""
    return TaskError(f"{method}: {type(error).__name__}: {brief(error)} ({where(error)})")


@contextmanager
def failures_named(method: str, *but: type[Exception]) -> Iterator[None]:
    """Around a call of a `method` of the user's task. Raises TaskError for what it raises, except ours and `but`.

    What passed through no code of the user's is a bug of ours, and keeps its traceback; so does what tells of a lost
    worker or of memory.
    """
    kept: tuple[type[Exception], ...] = (DisttrainError, *but)
    try:
        yield
    except kept:
        raise
    except Exception as error:  # a user's task may raise anything
        if is_circumstance(error) or not is_in_user_code(error):
            raise
        raise failure_of(method, error) from error


class FailuresNamedAt:
    """As `failures_named`, at a `place` in the training, as " at step 3": with the traceback, since it worked before.

    Raises UserCodeError, worth a retry, for RuntimeError and OSError, which may have to do with the machine. A class,
    since every step comes through here and a generator takes three times the calls.
    """

    def __init__(self, method: str, place: str) -> None:
        self._method, self._place = method, place

    def __enter__(self) -> None:
        """Nothing is looked at before the block fails."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what names the method."""
        if not isinstance(error, Exception) or isinstance(error, DisttrainError):
            return
        if is_circumstance(error) or not is_in_user_code(error):
            return
        kind = UserCodeError if isinstance(error, RuntimeError | OSError) else TaskError
        words = str(failure_of(f"{self._method}{self._place}", error))
        raise kind(words, "".join(traceback.format_exception(error))) from error


def is_in_user_code(error: BaseException) -> bool:
    """Whether `error` passed through code that is neither installed nor ours, below where it was caught."""
    return any(not _NOT_THE_USERS.search(frame.filename) for frame in traceback.extract_tb(error.__traceback__))


def defined_at(kind: Callable[..., object]) -> str:
    """file:line of a class or a function."""
    import inspect  # for messages alone

    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):  # made by exec, or in a prompt; an object that can be called
        return f"in {kind.__module__}"


def where(error: BaseException) -> str:
    """file:line where `error` was raised: the innermost place that is neither installed nor ours, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _NOT_THE_USERS.search(frame.filename)]
    return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}" if frames else "place unknown"


def mark_failure(error: BaseException, at: float | None = None) -> None:
    """Note on `error` when it struck (`at`, or now): cleaning up takes time, and the first to fail is the cause."""
    error.__dict__.setdefault("_failed_at", time.time() if at is None else at)


def failure_time(error: BaseException) -> float:
    """When `error` struck, in seconds since 1970, if it was noted; else now."""
    failed_at: float = error.__dict__.get("_failed_at", time.time())
    return failed_at
