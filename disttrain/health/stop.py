"""Requests to stop, and a launcher that is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from disttrain.distributed.launched import LAUNCHER, OUR_LAUNCHERS, launched_by
from disttrain.distributed.lease import HeldLease
from disttrain.distributed.requests import STOP_SIGNALS, heard_requests, name_of
from disttrain.layout import LAUNCHER_PID, VERDICTS

# A terminal's Ctrl-C reaches a worker twice, from the terminal and from the launcher: within this time it is one.
_SAME_REQUEST_S = 2.0
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 1.0


class StopRequest:
    """Whether this process was asked to stop. The loop reads it and agrees with the other ranks on a step."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Note the signal; a second request ends the process at once.

        Raises KeyboardInterrupt at the second one.
        """
        now = time.monotonic()
        if self.received is None:
            self.received = name_of(number)
            self._received_at = now
        elif now - self._received_at > _SAME_REQUEST_S:
            raise KeyboardInterrupt

    def words(self) -> str:
        """What asked, in brackets; empty if that was our launcher, which has reported what asked it."""
        if launched_by() in OUR_LAUNCHERS and self.received == "SIGTERM":
            return ""
        return f" ({self.received or 'another worker'})"

    def ask(self, by: str) -> None:
        """Note a request that came by other means than a signal; repeating it changes nothing."""
        if self.received is None:
            self.received = by


@contextmanager
def stop_file(path: Path, request: StopRequest, say: Callable[[str], None], *, is_new: bool = True) -> Iterator[None]:
    """Take the file `path` for a request to stop as soon as it is there, within a second or so.

    It is removed when the block ends, so that the next start resumes. One that is there already was meant for a job
    that has ended since, if this one `is_new`: it is removed, and `say` is called.
    """
    if is_new:
        if path.exists():
            say(f"{path} was left over from an earlier start and is removed")
        with suppress(OSError):
            path.unlink(missing_ok=True)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            if path.exists():
                request.ask(f"the file {path}")
                return

    thread = threading.Thread(target=look, name="disttrain-stop-file", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT, SIGUSR1 and SIGHUP into a request to stop, for as long as the block runs.

    Under `nohup`, SIGHUP stays ignored. Outside the main thread, where Python cannot handle signals, no request ever
    arrives.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in heard_requests()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_undisturbed() -> Iterator[None]:
    """Once the block has ended, requests to stop change nothing: all that this process does is to end.

    One that came in its last second would kill a process whose work is done, and make the launcher believe that it is
    not. For a process that does nothing else.
    """
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def end_with_launcher() -> None:
    """End this process when the launcher that started it is gone, if it is one of ours.

    The kernel ends it (prctl(2), PR_SET_PDEATHSIG), even if it has been stopped. What counts as parent is a thread: our
    launchers start workers from their main one. One that gives verdicts also holds the other end of standard input.
    """
    launcher = launched_by()
    if launcher not in OUR_LAUNCHERS:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get(LAUNCHER_PID) or os.getppid()):
            os._exit(1)  # it was gone before

    def wait() -> None:
        while os.read(sys.__stdin__.fileno() if sys.__stdin__ else 0, 1024):
            pass
        os._exit(1)

    if launcher == LAUNCHER or VERDICTS in os.environ:
        threading.Thread(target=wait, name="launcher-watch", daemon=True).start()
    lease = HeldLease.of_this_process()
    if lease is not None:
        # With its children, as its launcher would: that is cut off, or stands still.
        lease.watch(lambda: os.killpg(os.getpgrp(), signal.SIGKILL))
