"""What the training process has its sender do, as the sender hears it."""

from __future__ import annotations

import os
import threading
import time
from typing import TextIO

_LAST_WORDS_S = 3.0  # how long a sender may still take after its training process was killed


class Orders:
    """What the training process wants, read by a thread of its own so that no slow request hides it."""

    def __init__(self, stream: TextIO) -> None:
        self.deadline: float | None = None  # by time.monotonic(); set when it is time to finish
        self.abandoned = False
        self._hurry, self._end = threading.Event(), threading.Event()
        self._parent = os.getppid()
        self._stream = stream
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def over(self) -> bool:
        return self.deadline is not None

    @property
    def hurried(self) -> bool:
        """Whether training has ended."""
        return self._hurry.is_set()

    def wait_beside_training(self, timeout_s: float) -> None:
        """Return after `timeout_s`, or at once when training has ended."""
        self._wait(self._hurry, timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Return after `timeout_s`, or at once when it is time to finish."""
        self._wait(self._end, timeout_s)

    def _wait(self, event: threading.Event, timeout_s: float) -> None:
        event.wait(timeout_s)
        if os.getppid() != self._parent:
            # The pipe's end may live on in a process that was forked off the training process.
            self._abandon()

    def _listen(self) -> None:
        for line in self._stream:
            word, _, seconds = line.strip().partition(" ")
            if word == "hurry":
                self._hurry.set()
            if word == "finish":
                self._finish(float(seconds))
                return
        self._abandon()

    def _finish(self, patience_s: float) -> None:
        self.deadline = time.monotonic() + patience_s
        self._hurry.set()
        self._end.set()

    def _abandon(self) -> None:
        if not self.over:
            self.abandoned = True
            self._finish(_LAST_WORDS_S)
            threading.Timer(_LAST_WORDS_S, os._exit, (1,)).start()
