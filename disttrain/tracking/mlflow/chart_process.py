"""Charts drawn in a process of their own, while what they show is on its way to MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn


class ChartProcess:
    """Draws the charts of a run whenever it is asked to. To be made while this process has no other threads.

    It is forked off, so that it costs what matplotlib does, and not a second interpreter's start. It ends with this
    process. Where it cannot be, or dies, the charts are drawn in this process.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._is_drawing = False
        ours, theirs = socket.socketpair()
        self._orders, self._answers = ours.makefile("w"), ours.makefile("r")
        with theirs:
            if _forked():
                self._orders.close()
                self._answers.close()
                ours.close()
                _draw_when_asked(run_dir, theirs)
        ours.close()  # the two files keep it open

    def prepare(self) -> None:
        """Have it import what draws them now: at the end somebody waits for it."""
        self._order("prepare")

    def begin(self) -> None:
        """Have it draw them, as the journal is now, without waiting for it."""
        if not self._is_drawing:
            self._is_drawing = self._order("draw")

    def drawn(self) -> list[Path]:
        """The files that were drawn since `begin`, or now. Raises as `draw_charts` does, and RuntimeError."""
        self.begin()
        self._is_drawing = False
        answer = {}
        with contextlib.suppress(OSError, ValueError):  # it is not there any more
            answer = json.loads(self._answers.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if "drawn" in answer:
            return [Path(name) for name in answer["drawn"]]
        return _drawn(self._run_dir)

    def _order(self, what: str) -> bool:
        try:
            print(what, file=self._orders, flush=True)
        except OSError:
            return False
        return True


def _forked() -> bool:
    """Whether this is a new process, forked off just now; in the old one also False if there can be no more."""
    with contextlib.suppress(OSError):  # RLIMIT_NPROC, or a container's limit
        return hasattr(os, "fork") and os.fork() == 0
    return False


def _drawn(run_dir: Path) -> list[Path]:
    from disttrain.tracking.charts import draw_charts

    return draw_charts(run_dir)


def _draw_when_asked(run_dir: Path, orders: socket.socket) -> NoReturn:
    """Never returns: the process ends when the one that it was forked off does."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):  # whoever reads what the sender prints would wait for this process as well
            os.dup2(nothing, descriptor)
        with orders.makefile("r") as lines, orders.makefile("w") as answers:
            for line in lines:
                with contextlib.suppress(Exception):
                    from disttrain.tracking.chart_style import new_figure

                    new_figure(1, 1)
                if line.strip() == "draw":
                    print(json.dumps(_answer(run_dir)), file=answers, flush=True)
    finally:
        sys.stderr.flush()
        os._exit(0)


def _answer(run_dir: Path) -> dict[str, object]:
    try:
        return {"drawn": [str(path) for path in _drawn(run_dir)]}
    except Exception as error:  # matplotlib may be missing, evaluation.json may be anything
        return {"error": str(error)}
