"""How a failure reaches the launcher and the user."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from disttrain.errors import ExitCode
from disttrain.world import launched_by, rank_hint

LAUNCHER = "disttrain"
"""What our own launcher of one machine calls itself."""
_SHOWS_FAILURES = (LAUNCHER, "disttrain node")  # they show the first failing worker's message: the worker need not


def report_failure(
    message: str,
    exit_code: int,
    trace: str | None,
    failed_at: float,
    *,
    consequence: bool = False,
    is_agreed: bool = False,
) -> None:
    """Write the failure to the file that the launcher named in TORCHELASTIC_ERROR_FILE, if it named one.

    Without our launcher, print it on standard error too. `failed_at` is in seconds since 1970; a `consequence` is
    mostly somebody else's failure, and one that `is_agreed` is no rank's own. Raises OSError if the file cannot be
    written.
    """
    rank, host = rank_hint(), socket.gethostname()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        failure = {
            "message": message,
            "exit_code": int(exit_code),
            "rank": rank,
            "host": host,
            "traceback": trace,
            "consequence": consequence,
            "is_agreed": is_agreed,
            "time": failed_at,
            "timestamp": int(failed_at),  # torchrun's name for it, in whole seconds
        }
        # In place: it is read when this process is gone, and our launcher's file has no name to rename to.
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
    told_by_all = is_agreed or exit_code in (ExitCode.STOPPED, ExitCode.DIVERGED)
    if launched_by() not in _SHOWS_FAILURES and (not rank or not told_by_all):
        who = "" if rank is None or is_agreed else f"rank {rank} on {host}: "
        print(f"{trace or ''}disttrain: {who}{message}", file=sys.stderr, flush=True)
