"""What the user sees: a progress bar on a terminal, plain lines in a pipe, and only from rank 0."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from disttrain.errors import printable
from disttrain.terminal.output import take_the_launchers_streams

if TYPE_CHECKING:
    from disttrain.terminal.bar import Bar

_log = logging.getLogger("disttrain")


def _write(text: str, stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a pipe without a reader, a full disk, a closed stream: the log has it
        print(printable(text), file=stream, flush=True)


class _Relay(logging.Handler):
    """Shows log records on the console."""

    def __init__(self, show: Callable[[str], None], warn: Callable[[str], None]) -> None:
        super().__init__()
        self._show_record, self._warn = show, warn

    def emit(self, record: logging.LogRecord) -> None:
        (self._warn if record.levelno >= logging.WARNING else self._show_record)(record.getMessage())


class Console:
    """Lines, warnings and progress for the user; everything but progress goes to the log as well."""

    def __init__(self, *, speaks: bool, every_s: float = 30.0) -> None:
        """`every_s`: seconds of silence after which, where there is no bar, a line reports progress."""
        self._speaks, self._every_s = speaks, every_s
        self._bar: Bar | None = None
        self._total_steps: int | None = None  # while training is under way
        self._words: tuple[str, ...] = ()
        self._last_words = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()

    def line(self, text: str = "") -> None:
        """Show a line."""
        if text:
            _log.info("%s", text)
        self._show(text)

    def _show(self, text: str) -> None:
        if not self._speaks:
            return
        self._last_words = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            _write(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Show a warning, on standard error."""
        _log.warning("%s", text)
        self._show_warning(text)

    def _show_warning(self, text: str) -> None:
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.console.print(f"warning: {printable(text)}", style="yellow", markup=False, highlight=False)
        else:
            _write(f"warning: {text}", sys.stderr)

    @contextmanager
    def relaying(self, logger: str) -> Iterator[None]:
        """Show the messages of `logger` (which reach the log by themselves) while the block runs."""
        relay = _Relay(self._show, self._show_warning)
        logging.getLogger(logger).addHandler(relay)
        try:
            yield
        finally:
            logging.getLogger(logger).removeHandler(relay)

    def start_progress(self, step: int, total_steps: int) -> None:
        """Begin to show how far training has come: as a bar on a terminal."""
        if not self._speaks:
            return
        self._total_steps, self._last_words = total_steps, time.monotonic()
        if sys.stdout.isatty():
            from disttrain.terminal.bar import Bar

            self._bar = Bar(step, total_steps)

    def take_over(self) -> None:
        """Speak to the user in the place of a worker that has died."""
        take_the_launchers_streams()
        self._speaks = True

    def measured(self, loss: float, pace: str) -> None:
        """What `progress` shows from now on; `loss` is the mean over a global batch, `pace` such as "9 images/s"."""
        self._words = (f"loss {loss:.4f}", pace)

    def progress(self, step: int, epoch: int, num_epochs: int) -> None:
        """Show that `step` is made: on the bar, or else in a line if nothing was printed for a while."""
        if self._bar is not None:
            self._bar.update(step, f"epoch {epoch}/{num_epochs}", self._words)
        elif self._is_due():
            steps = f"step {step} of {self._total_steps}"
            self._show(f"epoch {epoch}/{num_epochs}: {', '.join((steps, *self._words))}")

    def busy(self, text: str) -> None:
        """Report where training is, if there is no bar and nothing was printed for a while."""
        if self._bar is None and self._is_due():
            self._show(text)

    def _is_due(self) -> bool:
        return self._total_steps is not None and time.monotonic() - self._last_words >= self._every_s

    @contextmanager
    def saying_if_slow(self, text: str, after_s: float = 1.0) -> Iterator[None]:
        """Show the line if the block still runs after so many seconds."""
        timer = threading.Timer(after_s, self.line, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def end_progress(self) -> None:
        """Leave the terminal as it was."""
        self._total_steps = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
