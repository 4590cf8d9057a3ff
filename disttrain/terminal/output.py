"""Output that ends no run, whatever becomes of it: a terminal that is gone, a full disk, a pipe without a reader."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from disttrain.layout import CONSOLE, LAUNCHER_PID

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES_OF_ASCII = ("ascii", "us-ascii", "ansi_x3.4-1968")
_ASCII = {"…": b"...", "·": b"-"}


_ERRORS = "disttrain"  # how characters are written that the encoding lacks


def have_standard_streams() -> None:
    """Give this process the standard streams that it was started without, as `>&-` does: they lead nowhere.

    Otherwise the next file that is opened, a checkpoint perhaps, takes the place of standard output, and gets all that
    C code prints there. Nothing that is printed fails for its characters: see `_as_good_as_possible`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A bare environment's ASCII would have click write through a stream of its own, which loses such names.
            is_bare = stream.encoding.lower() in _NAMES_OF_ASCII and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if is_bare else stream.encoding, errors=_ERRORS)


def have_unbreakable_output() -> None:
    """Have nothing that this process prints, in its own or in a user's code, fail; what cannot be written is dropped.

    For a process that trains: its log holds all of its own messages.
    """
    have_standard_streams()
    sys.stdout, sys.stderr = _stream(1, like=sys.stdout), _stream(2, like=sys.stderr)


def take_the_launchers_streams() -> None:
    """Print where the launcher does from now on, if it has left descriptors of its streams."""
    for stream, left, descriptor in zip((sys.stdout, sys.stderr), _left_by_the_launcher(), (1, 2), strict=False):
        with suppress(OSError, ValueError):
            stream.flush()
        with suppress(OSError):
            os.dup2(left, descriptor)


def leave_the_launchers_streams() -> None:
    """Close the descriptors of the launcher's streams: this process will not print in the place of another.

    A process that a user's code forks would keep them open, and whoever reads the launcher's output would wait for it.
    """
    if _is_of_this_process():
        _close_those_left()


def keep_the_launchers_streams_from_forks() -> None:
    """Have what this process forks leave the launcher's streams, which it may need itself."""
    if _is_of_this_process():
        os.register_at_fork(after_in_child=_close_those_left)


def _is_of_this_process() -> bool:
    """Whether descriptors were left to it, and not to another process, which started this one."""
    return os.environ.get(LAUNCHER_PID) == str(os.getppid())


def _close_those_left() -> None:
    for descriptor in _left_by_the_launcher():
        if descriptor > 2:
            with suppress(OSError):
                os.close(descriptor)
    os.environ.pop(CONSOLE, None)


def _left_by_the_launcher() -> list[int]:
    numbers = os.environ.get(CONSOLE, "").split()
    return [int(number) for number in numbers] if len(numbers) == 2 and all(map(str.isdecimal, numbers)) else []


def unfailing(stream: TextIO) -> IO[str]:
    """`stream`, but what cannot be written is dropped: for a process whose standard streams are not ours to replace."""
    return cast(IO[str], _Unfailing(stream))


class _Unfailing:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stream(descriptor: int, like: TextIO | None = None) -> TextIO:
    encoding = getattr(like, "encoding", None) or "utf-8"
    # Written through: a buffer that could not be emptied would be tried again, and fail again, at the process's end.
    return io.TextIOWrapper(_Lossy(descriptor), encoding=encoding, errors=_ERRORS, write_through=True)


def _as_good_as_possible(error: UnicodeError) -> tuple[bytes, int]:
    """A file's name that is not UTF-8 comes out as it is; what an encoding lacks, as its nearest in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    written = b"".join(
        bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff" else _ASCII.get(character, b"?")
        for character in missing
    )
    return written, error.end


codecs.register_error(_ERRORS, _as_good_as_possible)


class _Lossy(io.RawIOBase):
    """Writes to a descriptor as much as it accepts. What it does not accept counts as written; that is logged once."""

    def __init__(self, descriptor: int) -> None:
        self.name = {1: "standard output", 2: "standard error"}[descriptor]
        self.mode = "wb"
        self._descriptor = descriptor
        self._is_known = False

    def write(self, data: ReadableBuffer) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if not self._is_known:
                    self._is_known = True
                    import logging  # not above: `--help` does without

                    logging.getLogger("disttrain").warning(
                        "%s can no longer be written: %s. Training continues.", self.name, error.strerror
                    )
                break
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)
