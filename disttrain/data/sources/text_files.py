"""Files of text: which there are below a folder, and what is in them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import numpy as np

from disttrain.errors import ConfigurationError, brief
from disttrain.files import open_to_read

_TEXTS = ("*.txt", "*.md", "*.rst")


@dataclass(frozen=True)
class TextFiles:
    """The files of both parts, in the order of their names. `test` is empty where no pattern chooses it."""

    train: list[Path]
    test: list[Path]


def find_texts(root: Path, files: str | list[str] | None, test_files: str | list[str] | None) -> TextFiles:
    """The files that match `files` (None: .txt, .md and .rst) in and below `root`; a file is taken as it is.

    What is hidden is left out, and no file or folder is taken twice, whatever links lead to it. Raises
    ConfigurationError where there is none.
    """
    if not root.exists():
        raise ConfigurationError(
            f"data.root: {root.absolute()} does not exist; give a file of text or a folder that holds some."
        )
    patterns = _TEXTS if files is None else (files,) if isinstance(files, str) else tuple(files)
    if root.is_dir():
        found = sorted((name, path) for name, path in _walk(root) if _matches(name, patterns))
    else:
        found = [(root.name, root)]
    if not found:
        raise ConfigurationError(
            f"data.root: no file in or below {root.absolute()} matches {' or '.join(patterns)}; set data.options.files."
        )
    if test_files is None:
        return TextFiles([path for _, path in found], [])
    chosen = (test_files,) if isinstance(test_files, str) else tuple(test_files)
    test = [path for name, path in found if _matches(name, chosen)]
    train = [path for name, path in found if not _matches(name, chosen)]
    if not train or not test:
        which = "all" if test else "none"
        raise ConfigurationError(
            f"data.options.test_files: {' or '.join(chosen)} matches {which} of the {len(found)} files in "
            f"{root.absolute()}; it has to match some, and leave some to train on."
        )
    return TextFiles(train, test)


def read_utf8(path: Path, key: str = "", otherwise: str = "") -> str:
    """A file's text, without the byte order mark that it may begin with. Raises ConfigurationError.

    `key` names what asks for the file, `otherwise` what can be done besides converting it.
    """
    with _opened(path) as file:
        content = file.read()
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{f'{key}: ' if key else ''}{brief(path)} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
            f"{error.start:,}; convert the file{otherwise}."
        ) from error


def map_bytes(path: Path) -> np.ndarray:
    """A file's bytes, (n,) uint8, as a memory map: its pages are read when they are needed, by all workers together."""
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_to_read(path, follow=True) as file:
            yield file
    except OSError as error:
        raise ConfigurationError(f"{brief(path)} cannot be read: {error.strerror or error}.") from error


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(path from `root` with slashes, path) of every file that is not hidden; links are followed, but none twice."""
    seen: set[str] = set()
    waiting = [("", root)]
    while waiting:
        prefix, folder = waiting.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append((f"{prefix}{entry.name}/", folder / entry.name))
            elif entry.is_file() and (real := os.path.realpath(entry.path)) not in seen:
                seen.add(real)
                yield prefix + entry.name, folder / entry.name


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
