"""Opening files in folders that may come from anywhere: never through a link, and never what is not a file.

A link at a name that a run writes would have it truncate, replace or extend a file elsewhere; a named pipe or a device
in place of a file would have its reader wait for ever.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

_DEEPEST = 100

_KINDS = (
    (stat.S_ISLNK, errno.ELOOP, "it is a symbolic link, and none is followed here"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a named pipe, not a file"),
    (stat.S_ISSOCK, errno.EINVAL, "it is a socket, not a file"),
    (stat.S_ISCHR, errno.EINVAL, "it is a device, not a file"),
    (stat.S_ISBLK, errno.EINVAL, "it is a device, not a file"),
    (stat.S_ISDIR, errno.EISDIR, "it is a folder, not a file"),
)


def open_safely(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """`os.open` for regular files alone; returns the descriptor.

    With `follow`, `path` may be a link to a file. Raises OSError, whose `strerror` names what else is there: at once,
    also for a pipe without a writer.
    """
    refuse_irregular(path, follow=follow)  # before it is opened: that alone makes some devices act
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, 0o666)
    try:
        _refuse(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(path: str | os.PathLike[str], *, follow: bool = False) -> BufferedReader:
    """Open a regular file to read bytes. Raises OSError, as `open_safely` does."""
    return os.fdopen(open_safely(path, follow=follow), "rb")


def open_to_append(path: str | os.PathLike[str]) -> FileIO:
    """Open or make a regular file to append bytes, each write at once. Raises OSError, as `open_safely` does."""
    return os.fdopen(open_safely(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of the file to read for libraries in Rust or C++, which take none that is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open_to_read(path) as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a regular file. Raises OSError, as `open_safely` does."""
    with open_to_read(path) as file:
        return file.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file. Raises OSError, as `open_safely` does, or UnicodeDecodeError."""
    return read_bytes(path).decode()


def parse_json(content: str | bytes) -> Any:
    """`json.loads` for what may come from anywhere; nothing nested so deeply that a walk fails. Raises ValueError."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[list[Any] | dict[str, Any]] = [[value]]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _items(outer) if isinstance(inner, (list, dict))]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _items(outer: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def replace_file(path: Path, content: str | bytes, temporary: Path | None = None) -> None:
    """Replace the file `path` by `content`: a reader sees the old one or the new one. Raises OSError.

    It is written under the name `temporary`, which two processes must not share; by default `being_written(path)`.
    """
    temporary = temporary or being_written(path)
    try:
        temporary.unlink(missing_ok=True)  # a killed writer's; of a link, the link itself
        with os.fdopen(open_safely(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the new name with nothing behind it
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def being_written(path: Path) -> Path:
    """The name under which `replace_file` writes."""
    return path.with_name(f".{path.name}.writing")


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, or find it there. Raises OSError, also for a link to a folder."""
    path.mkdir(parents=True, exist_ok=True)
    refuse_irregular(path, is_folder=True)


def refuse_irregular(path: str | os.PathLike[str], *, is_folder: bool = False, follow: bool = False) -> None:
    """Raise OSError if something else than a regular file (or a folder) is at `path`; nothing may be."""
    try:
        mode = os.stat(path, follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return
    if is_folder and not stat.S_ISDIR(mode) and not stat.S_ISLNK(mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", os.fspath(path))
    if not (is_folder and stat.S_ISDIR(mode)):
        _refuse(mode, path)


def path_inside(folder: Path, name: str) -> Path | None:
    """The path of `name` below `folder`; None if it leads out of it, or through a link."""
    try:
        root = folder.resolve()
        path = Path(os.path.normpath(root / name))
        return path if path.is_relative_to(root) and path.resolve() == path else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return None


def _refuse(mode: int, path: str | os.PathLike[str]) -> None:
    for is_kind, number, words in _KINDS:
        if is_kind(mode):
            raise OSError(number, words, os.fspath(path))
