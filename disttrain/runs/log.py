"""A log file that a full disk cannot turn into a flood of tracebacks."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path


class LogFile(logging.Handler):
    """Appends records to a file, each in one write. One that cannot be written is dropped; the first is a warning."""

    def __init__(self, file: FileIO, path: Path) -> None:
        """`file`: open to append at `path`, and closed by `close`."""
        super().__init__()
        self._file, self._path = file, path
        self._is_known = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append `record`."""
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            if not self._is_known:
                self._is_known = True
                with suppress(OSError, ValueError):
                    words = f"warning: {self._path} cannot be written: {error.strerror}. Training continues."
                    print(words, file=sys.stderr, flush=True)
        except Exception:  # a message whose arguments do not fit it
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
