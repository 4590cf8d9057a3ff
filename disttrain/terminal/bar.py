"""The progress of training on one line of a terminal: where it is narrow, words go before the bar does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from disttrain.terminal.output import unfailing

_LONGEST, _SHORTEST = 40, 10  # of the bar itself, in columns


class Bar:
    """A bar that stands below the lines printed through `console`."""

    def __init__(self, step: int, total_steps: int) -> None:
        self.console = Console(file=unfailing(sys.stdout))
        """Where to print while the bar stands."""
        self._progress = Progress(_Line(self.console), console=self.console)
        self._progress.start()
        self._task = self._progress.add_task("training", total=total_steps, completed=step, words=())

    def update(self, step: int, title: str, words: Sequence[str]) -> None:
        """Move it; `words` are shown behind it as far as there is room, the first first."""
        self._progress.update(self._task, completed=step, description=title, words=words)

    def stop(self) -> None:
        """Leave it as it is, and the terminal as it was."""
        self._progress.stop()


class _Line(ProgressColumn):
    """All of the line, as wide as the terminal is now."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        remaining = task.time_remaining
        left = (f"{timedelta(seconds=int(remaining))} left",) if remaining else ()  # it begins unknown, ends as 0
        return line(
            task.description,
            int(task.completed),
            int(task.total or 0),
            (*task.fields["words"], *left),
            width=self._console.width,
            ascii_only=self._console.options.ascii_only,
        )


def line(title: str, step: int, total: int, words: Sequence[str], *, width: int, ascii_only: bool = False) -> Text:
    """Title, bar, count and words in `width` columns: of the words, from the first, as many as leave the bar room."""
    dash, dot = ("-", " - ") if ascii_only else ("━", " · ")
    count = f" {step}/{total}"
    for number in range(len(words), -1, -1):
        behind = " ".join([count, dot.join(words[:number])]).rstrip()
        room = width - len(title) - 1 - len(behind)
        if room >= _SHORTEST:
            break
    else:
        title, room = "", width - len(behind)
    length = max(1, min(_LONGEST, room))
    done = length * step // total if total else length
    bar = ((dash * done, "bar.finished" if done == length else "bar.complete"), (dash * (length - done), "bar.back"))
    return Text.assemble(f"{title} " if title else "", *bar, behind, no_wrap=True, overflow="crop")
