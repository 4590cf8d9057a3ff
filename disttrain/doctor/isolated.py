"""A function in a process of its own, which may fail, hang or crash without harm to any other process."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

# How long a process that is asked to end may take to remove what it made.
_TO_CLEAN_UP_S = 2.0


class CrashedError(Exception):
    """The process ended without an answer. The message says how."""


class Isolated:
    """`function()` in a fork of this process, which must have no threads that hold locks.

    What it prints is discarded: the answer is what it returns, as JSON holds it. It ends with this process, however
    that ends, and its `finally` blocks are run first wherever that is possible.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._answer, answer = os.pipe()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115, closed by `end`
        parent = os.getpid()
        self._pid: int | None = os.fork()
        if self._pid == 0:
            _run(function, answer, self._words.fileno(), parent)
        os.close(answer)

    def result(self, deadline: float) -> Any:
        """What the function returned. Raises TimeoutError at `deadline` (time.monotonic()), CrashedError."""
        raw = b""
        while chunk := self._next(deadline):
            raw += chunk
        code = self._wait(_TO_CLEAN_UP_S)
        if not raw:
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines()
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise CrashedError(": ".join([how, *words[-1:]]))
        return json.loads(raw)

    def end(self) -> None:
        """End the process if it still runs; it has a moment to clean up."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGTERM)
            if self._wait(_TO_CLEAN_UP_S) is None and self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)
                self._wait(_TO_CLEAN_UP_S)  # and no longer: the kernel may hold on to it
        if not self._words.closed:
            os.close(self._answer)
            self._words.close()

    def _next(self, deadline: float) -> bytes:
        ready, _, _ = select.select([self._answer], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        return os.read(self._answer, 65536)

    def _wait(self, timeout_s: float) -> int | None:
        """The exit code (negative: of a signal), or None if it still runs."""
        deadline = time.monotonic() + timeout_s
        while self._pid is not None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = None
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return None


def _run(function: Callable[[], Any], answer: int, words: int, parent: int) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _unwind if number == signal.SIGTERM else signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(words, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        raw = json.dumps(function()).encode()
        while raw:
            raw = raw[os.write(answer, raw) :]
        code = 0
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)  # what the parent has to clean up at its exit is not ours


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_CLEAN_UP_S)
    os.kill(os.getpid(), signal.SIGKILL)
