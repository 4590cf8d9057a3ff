"""What a person sees: a progress bar on a terminal, plain lines in a pipe, and only from rank 0."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_log = logging.getLogger("disttrain")


def _write(text: str, stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # a pipe that nobody reads, a full disk, a closed stream: the log has it
        print(text, file=stream, flush=True)


class _Relay(logging.Handler):
    """Shows log records on the console."""

    def __init__(self, show: Callable[[str], None], warn: Callable[[str], None]) -> None:
        super().__init__()
        self._show_record, self._warn = show, warn

    def emit(self, record: logging.LogRecord) -> None:
        (self._warn if record.levelno >= logging.WARNING else self._show_record)(record.getMessage())


class Console:
    """Lines, warnings and progress for the user; everything but progress goes to the log as well."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._progress: Progress | None = None
        self._task: TaskID | None = None

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
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _write(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Show a warning, on standard error."""
        _log.warning("%s", text)
        self._show_warning(text)

    def _show_warning(self, text: str) -> None:
        if not self._speaks:
            return
        if self._progress is not None:
            self._progress.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
        else:
            _write(f"warning: {text}", sys.stderr)

    @contextmanager
    def relaying(self, logger: str) -> Iterator[None]:
        """Show what `logger` has to say (it goes to the log by itself), as long as the block runs."""
        relay = _Relay(self._show, self._show_warning)
        logging.getLogger(logger).addHandler(relay)
        try:
            yield
        finally:
            logging.getLogger(logger).removeHandler(relay)

    def start_progress(self, step: int, total_steps: int) -> None:
        """Begin the progress bar, if somebody is looking."""
        if not self._speaks or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:,.0f} images/s ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=step, loss=float("nan"), rate=float("nan")
        )

    def progress(self, step: int, epoch: int, num_epochs: int, loss: float, images_per_second: float) -> None:
        """Move the progress bar; `loss` is the mean over the global batch of `step`."""
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                completed=step,
                description=f"epoch {epoch}/{num_epochs}",
                loss=loss,
                rate=images_per_second,
            )

    def end_progress(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
