"""How a worker's process ends."""

from __future__ import annotations

import subprocess
import sys

_ENDS_WITH_7 = """
import atexit, concurrent.futures, sys, threading, time
from disttrain.worker import leave

def late() -> None:
    time.sleep(0.2)
    print("thread done")

atexit.register(print, "handler run")
{thread}
leave(7)
"""


def _ending(thread: str) -> tuple[int, list[str]]:
    code = _ENDS_WITH_7.format(thread=thread)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout.splitlines()


def test_handlers_are_run_and_output_is_flushed_before_a_quick_end() -> None:
    assert _ending("") == (7, ["handler run"])


def test_threads_that_python_waits_for_are_waited_for() -> None:
    pool = "concurrent.futures.ThreadPoolExecutor().submit(late)"
    assert _ending(pool) == (7, ["thread done", "handler run"])
